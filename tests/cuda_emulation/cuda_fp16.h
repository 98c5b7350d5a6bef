// float16 as the compiler has it.
#pragma once

struct __half {
  _Float16 value;
  __half() = default;
  explicit __half(float wide) : value(static_cast<_Float16>(wide)) {}
  operator float() const { return static_cast<float>(value); }
};
