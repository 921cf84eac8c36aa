// Argument checks of the tensor ops.
#pragma once

#include <sstream>
#include <stdexcept>

namespace ztok {

// The message names the op, the argument, what was expected and what came. A std::runtime_error crosses the stable
// ABI as Python's RuntimeError.
template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace ztok

#define ZTOK_CHECK(condition, op, ...)               \
  do {                                               \
    if (!(condition)) ::ztok::fail(op, __VA_ARGS__); \
  } while (0)
