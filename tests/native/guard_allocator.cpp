// An allocator of CPU tensors that puts each at a page without access: before its first byte or behind its last. For
// tests of what a kernel does to the results and scratch tensors that it makes itself.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <mutex>
#include <unordered_map>

#include <c10/core/Allocator.h>

namespace {

struct Mapping {
  char* base;
  size_t size;
};

// By the address of the data: oneDNN takes memory that is known by that address alone.
std::mutex mutex;
std::unordered_map<void*, Mapping> mappings;

void release(void* data) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = mappings.find(data);
  if (found == mappings.end()) return;
  munmap(found->second.base, found->second.size);
  mappings.erase(found);
}

struct GuardAllocator final : c10::Allocator {
  bool at_end = true;

  c10::DataPtr allocate(size_t bytes) override {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t inside = (bytes + page - 1) / page * page, size = inside + 2 * page;
    void* base = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(base != MAP_FAILED, "guard_allocator: no memory for ", bytes, " bytes");
    char* data = static_cast<char*>(base) + page;
    TORCH_CHECK(inside == 0 || mprotect(data, inside, PROT_READ | PROT_WRITE) == 0, "guard_allocator: mprotect failed");
    // What is left as it was allocated is another value on each side, so that the results differ.
    std::memset(data, at_end ? 0xFF : 0, inside);
    if (at_end) data += inside - bytes;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      mappings[data] = {static_cast<char*>(base), size};
    }
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};

GuardAllocator guarded;
c10::Allocator* usual = nullptr;

}  // namespace

// From now on tensors end (1) or begin (0) at a guard page.
extern "C" void guard_allocations(int at_end) {
  if (!usual) usual = c10::GetAllocator(c10::DeviceType::CPU);
  guarded.at_end = at_end != 0;
  c10::SetAllocator(c10::DeviceType::CPU, &guarded);
}

extern "C" void allocate_as_usual() {
  if (usual) c10::SetAllocator(c10::DeviceType::CPU, usual);
}
