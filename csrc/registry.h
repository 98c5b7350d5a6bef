// Kernels by name. A record travels as 64-bit words, in the order of its fields, and is copied into its struct here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "ops.h"

namespace lacfast {

struct Kernel {
  std::vector<std::size_t> words;  // of every record
  void (*run)(const std::int64_t* const* records);
};

// "cpu.gae" -> its kernel; filled when the module is loaded.
inline std::map<std::string, Kernel>& kernels_by_name() {
  static std::map<std::string, Kernel> all;
  return all;
}

template <typename Record>
Record record_from(const std::int64_t* words) {
  static_assert(std::is_trivially_copyable<Record>::value && sizeof(Record) % sizeof(std::int64_t) == 0,
                "a record is made of 64-bit fields");
  Record record;
  std::memcpy(&record, words, sizeof record);
  return record;
}

// What registers a function of records: `const Registered<&gae> registered("cpu.gae");`
template <auto Function>
struct Registered;

template <typename... Records, void (*Function)(const Records&...)>
struct Registered<Function> {
  explicit Registered(const char* name) {
    kernels_by_name()[name] = {{sizeof(Records) / sizeof(std::int64_t)...}, &run};
  }

 private:
  static void run(const std::int64_t* const* records) { call(records, std::index_sequence_for<Records...>{}); }

  template <std::size_t... I>
  static void call(const std::int64_t* const* records, std::index_sequence<I...>) {
    Function(record_from<Records>(records[I])...);
  }
};

}  // namespace lacfast
