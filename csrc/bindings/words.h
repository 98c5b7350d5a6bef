// A NamedTuple as the words of a record of ops.h, by one format character per field: t a tensor or None, s one whose
// sizes count, d a number, i an integer or bool, D and I lists of them. A tensor has data_ptr(), dtype and shape.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../registry.h"
#include "dlpack.h"

namespace lacfast {

namespace py = pybind11;

// What Python has told once of torch.
struct Torch {
  // The dtypes of DType in its order; their addresses, since a comparison is all that they are for.
  std::array<PyObject*, 4> dtypes{};
  PyTypeObject* tensor = nullptr;
  // Null where torch is too old for it.
  int (*view)(void* tensor, dlpack::DLTensor* out) = nullptr;
};

inline Torch torch;

inline void name_dtypes(const std::array<py::object, 4>& dtypes) {
  for (std::size_t i = 0; i < dtypes.size(); ++i) torch.dtypes[i] = dtypes[i].inc_ref().ptr();
}

// `exchange`: the capsule tensor.__dlpack_c_exchange_api__, or None.
inline void use_dlpack(const py::type& tensor, const py::object& exchange) {
  torch.tensor = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  torch.view = nullptr;
  if (exchange.is_none()) return;
  const auto* api = static_cast<dlpack::DLPackExchangeAPI*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  if (api->major == 1) torch.view = api->dltensor_from_py_object_no_sync;
}

// False where DLPack does not show the tensor: fake, wrapped, or of a torch that is too old.
inline bool view_of(PyObject* value, dlpack::DLTensor& view) {
  if (torch.view == nullptr || !PyObject_TypeCheck(value, torch.tensor)) return false;
  if (torch.view(value, &view) == 0) return view.byte_offset == 0;
  PyErr_Clear();
  return false;
}

inline DType dtype_of(dlpack::DLDataType dtype) {
  if (dtype.lanes != 1) return DType::other;
  if (dtype.code == dlpack::kDLBfloat && dtype.bits == 16) return DType::bfloat16;
  if (dtype.code != dlpack::kDLFloat) return DType::other;
  return dtype.bits == 32 ? DType::float32 : dtype.bits == 16 ? DType::float16 : dtype.bits == 64 ? DType::float64 : DType::other;
}

inline py::object checked(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline std::int64_t integer_of(PyObject* value) {
  const std::int64_t number = PyLong_AsLongLong(value);
  if (number == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return number;
}

inline double number_of(PyObject* value) {
  const double number = PyFloat_AsDouble(value);
  if (number == -1.0 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return number;
}

// The same as below, asked of Python.
inline Tensor slow_tensor_of(PyObject* value) {
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  static PyObject* const dtype = PyUnicode_InternFromString("dtype");
  void* data = PyLong_AsVoidPtr(checked(PyObject_CallMethodNoArgs(value, data_ptr)).ptr());
  const py::object own_dtype = checked(PyObject_GetAttr(value, dtype));
  for (std::size_t code = 0; code < torch.dtypes.size(); ++code)
    if (own_dtype.ptr() == torch.dtypes[code]) return {data, static_cast<DType>(code)};
  return {data, DType::other};
}

inline Tensor tensor_of(PyObject* value) {
  if (value == Py_None) return {nullptr, DType::float32};
  dlpack::DLTensor view;
  return view_of(value, view) ? Tensor{view.data, dtype_of(view.dtype)} : slow_tensor_of(value);
}

// Devices, dtypes and shapes of tensors, or where one is None, as bytes that differ where any of these does. None where not all
// of them are plain, seen by DLPack and in order in memory.
inline py::object layout_of(const py::tuple& tensors) {
  thread_local std::string layout;
  layout.clear();
  const auto append = [](const auto& value) { layout.append(reinterpret_cast<const char*>(&value), sizeof value); };
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors.ptr()); ++i) {
    PyObject* value = PyTuple_GET_ITEM(tensors.ptr(), i);
    if (value == Py_None) {
      append(std::int32_t{-1});
      continue;
    }
    dlpack::DLTensor view;
    // A subclass may show another device and shape than it stores.
    if (Py_TYPE(value) != torch.tensor || !view_of(value, view)) return py::none();
    append(view.ndim);
    append(view.dtype);
    append(view.device);
    std::int64_t stride = 1;
    for (std::int32_t k = view.ndim - 1; k >= 0; --k) {
      if (view.strides != nullptr && view.shape[k] != 1 && view.strides[k] != stride) return py::none();
      stride *= view.shape[k];
      append(view.shape[k]);
    }
  }
  return py::bytes(layout);
}

inline void put_size(SizedTensor& tensor, std::size_t dimension, std::int64_t size) {
  tensor.numel *= size;
  if (dimension < 3) tensor.sizes[dimension] = size;
}

inline SizedTensor sized_tensor_of(PyObject* value) {
  static PyObject* const shape = PyUnicode_InternFromString("shape");
  if (value == Py_None) return {tensor_of(value), 0, {1, 1, 1}};
  dlpack::DLTensor view;
  if (view_of(value, view)) {
    SizedTensor tensor{{view.data, dtype_of(view.dtype)}, 1, {1, 1, 1}};
    for (std::int32_t i = 0; i < view.ndim; ++i) put_size(tensor, static_cast<std::size_t>(i), view.shape[i]);
    return tensor;
  }
  SizedTensor tensor{slow_tensor_of(value), 1, {1, 1, 1}};
  const py::object sizes = checked(PyObject_GetAttr(value, shape));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(sizes.ptr()); ++i)
    put_size(tensor, static_cast<std::size_t>(i), integer_of(PyTuple_GET_ITEM(sizes.ptr(), i)));
  return tensor;
}

template <typename T>
List<T> list_of(PyObject* value, T (*item)(PyObject*)) {
  List<T> list{};
  const py::object items = checked(PySequence_Tuple(value));
  list.count = PyTuple_GET_SIZE(items.ptr());
  if (list.count > kMaxListed) throw std::invalid_argument("a list of " + std::to_string(list.count) + "; 16 fit");
  for (std::int64_t i = 0; i < list.count; ++i) list.at[i] = item(PyTuple_GET_ITEM(items.ptr(), i));
  return list;
}

inline std::size_t words_in(const std::string& format) {
  std::size_t bytes = 0;
  for (const char kind : format)
    bytes += kind == 't'   ? sizeof(Tensor)
             : kind == 's' ? sizeof(SizedTensor)
             : kind < 'a'  ? sizeof(List<double>)
                           : sizeof(double);
  return bytes / sizeof(std::int64_t);
}

// Where the next field goes.
template <typename Field>
std::int64_t* put_field(std::int64_t* words, const Field& field) {
  std::memcpy(words, &field, sizeof field);
  return words + sizeof(Field) / sizeof(std::int64_t);
}

// Fills words_in(format) words.
inline void put_record(std::int64_t* words, const std::string& format, PyObject* record) {
  if (!PyTuple_Check(record) || PyTuple_GET_SIZE(record) != static_cast<Py_ssize_t>(format.size()))
    throw std::invalid_argument("a record is a tuple with a field for each character of " + format);
  for (std::size_t i = 0; i < format.size(); ++i) {
    PyObject* value = PyTuple_GET_ITEM(record, static_cast<Py_ssize_t>(i));
    switch (format[i]) {
      case 't':
        words = put_field(words, tensor_of(value));
        break;
      case 's':
        words = put_field(words, sized_tensor_of(value));
        break;
      case 'd':
        words = put_field(words, number_of(value));
        break;
      case 'i':
        words = put_field(words, integer_of(value));
        break;
      case 'D':
        words = put_field(words, list_of<double>(value, &number_of));
        break;
      case 'I':
        words = put_field(words, list_of<std::int64_t>(value, &integer_of));
        break;
      default:
        throw std::invalid_argument(std::string("unknown kind of field ") + format[i]);
    }
  }
}

}  // namespace lacfast
