// ztok_fast._host: work on the host that is too slow in Python. Arguments are checked by ztok_fast.codec.bitpack too;
// the checks here are those that memory safety rests on.
#include <limits>
#include <string>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "bitpack.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

void check_bits(int bits) {
  if (bits < 1 || bits > ztok::kMaxBits) {
    throw py::value_error("bits: expected 1 to 32, got " + std::to_string(bits));
  }
}

Array<uint8_t> pack_bits(const Array<uint32_t>& codes, int bits) {
  check_bits(bits);
  const auto count = static_cast<size_t>(codes.size());
  Array<uint8_t> packed(static_cast<py::ssize_t>(ztok::packed_size(count, bits)));
  const uint32_t* source = codes.data();
  uint8_t* target = packed.mutable_data();
  size_t bad = 0;
  {
    py::gil_scoped_release release;
    bad = ztok::first_too_wide(source, count, bits);
    if (bad == count) ztok::pack(source, count, bits, target);
  }
  if (bad != count) {
    throw py::value_error("codes: expected values below 2**" + std::to_string(bits) + ", got " +
                          std::to_string(source[bad]) + " at index " + std::to_string(bad));
  }
  return packed;
}

Array<int64_t> unpack_bits(const Array<uint8_t>& packed, int bits, int64_t count) {
  check_bits(bits);
  // packed_size stays below 5 * count, so this bound keeps it from wrapping around.
  if (count < 0 || count > std::numeric_limits<int64_t>::max() / 8) {
    throw py::value_error("count: expected a number of codes, at least 0, got " + std::to_string(count));
  }
  const size_t expected = ztok::packed_size(static_cast<size_t>(count), bits);
  if (static_cast<size_t>(packed.size()) != expected) {
    throw py::value_error("packed: expected " + std::to_string(expected) + " bytes for " + std::to_string(count) +
                          " codes of " + std::to_string(bits) + " bits, got " + std::to_string(packed.size()));
  }
  Array<int64_t> codes(count);
  const uint8_t* source = packed.data();
  int64_t* target = codes.mutable_data();
  {
    py::gil_scoped_release release;
    ztok::unpack(source, static_cast<size_t>(count), bits, target);
  }
  return codes;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = ZTOK_COMPILER;
  info["build_type"] = ZTOK_BUILD_TYPE;
  info["cplusplus"] = static_cast<long>(__cplusplus);
  info["pybind11"] = std::to_string(PYBIND11_VERSION_MAJOR) + "." + std::to_string(PYBIND11_VERSION_MINOR);
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side helpers of ztok_fast in C++.";
  m.def("pack_bits", &pack_bits, py::arg("codes").noconvert(), py::arg("bits"),
        "Pack uint32 codes [N] into bytes, `bits` bits each, least significant bit first.");
  m.def("unpack_bits", &unpack_bits, py::arg("packed").noconvert(), py::arg("bits"), py::arg("count"),
        "Unpack `count` codes of `bits` bits each from a uint8 array into int64 [count].");
  m.def("build_info", &build_info, "Compiler, build type and versions that this module was built with.");
}
