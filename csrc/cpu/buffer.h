// Uninitialised memory on cache-line boundaries.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace ztok {

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(size) * sizeof(T), std::align_val_t{64}))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

}  // namespace ztok
