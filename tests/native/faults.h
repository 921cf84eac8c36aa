// Turns an access to a guard page (tests/native/guard_pages.py) into something that a test can report.
#pragma once

#include <csetjmp>
#include <csignal>
#include <cstdint>

namespace ztok::host {

inline sigjmp_buf before_fault;
inline volatile uintptr_t fault_address = 0;

// Runs `f` and returns 0, or the address at which it read or wrote memory that it has no access to. What `f` held then
// is leaked: the test that asked fails.
template <typename F>
__attribute__((noinline)) uintptr_t faulting_address(const F& f) {
  struct sigaction action = {}, outer_segv, outer_bus;
  action.sa_sigaction = [](int, siginfo_t* info, void*) {
    const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
    fault_address = address == 0 ? 1 : address;
    siglongjmp(before_fault, 1);
  };
  action.sa_flags = SA_SIGINFO;
  fault_address = 0;
  sigaction(SIGSEGV, &action, &outer_segv);
  sigaction(SIGBUS, &action, &outer_bus);
  if (sigsetjmp(before_fault, 1) == 0) f();
  sigaction(SIGSEGV, &outer_segv, nullptr);
  sigaction(SIGBUS, &outer_bus, nullptr);
  return fault_address;
}

}  // namespace ztok::host
