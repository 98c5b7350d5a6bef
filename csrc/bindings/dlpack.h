// What of DLPack's C exchange (github.com/dmlc/dlpack, version 1) reads a Python tensor without a call of Python. It is an ABI:
// names and layout are DLPack's.
#pragma once

#include <cstdint>

namespace lacfast::dlpack {

struct DLDevice {
  std::int32_t device_type, device_id;
};

constexpr std::uint8_t kDLFloat = 2, kDLBfloat = 4;

struct DLDataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t *shape, *strides;  // the tensor's own
  std::uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  std::uint32_t major, minor;
  DLPackExchangeAPI* prev_api;
  void* managed[3];
  // 0, or else with a Python exception set. Null where the producer has none.
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
  void* current_work_stream;
};

}  // namespace lacfast::dlpack
