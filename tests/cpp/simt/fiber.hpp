// Fibers: stacks of one OS thread that are switched between by hand, and what the thread sanitizer is to take each for.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#else
inline void* __tsan_get_current_fiber() { return nullptr; }
inline void* __tsan_create_fiber(unsigned) { return nullptr; }
inline void __tsan_destroy_fiber(void*) {}
inline void __tsan_switch_to_fiber(void*, unsigned) {}
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
#endif

namespace simt {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "simt: %s\n", what);
  std::abort();
}

// What fibers and their scheduler share: atomic, so that the sanitizer says nothing of it, but ordering nothing.
template <class T>
class Cell {
 public:
  [[nodiscard]] T get() const { return value_.load(std::memory_order_relaxed); }
  void set(T value) { value_.store(value, std::memory_order_relaxed); }

 private:
  std::atomic<T> value_{};
};

#if defined(__x86_64__)
// The stack pointer, below which lie the six registers that a function must keep, and where it goes on.
struct Context {
  void* stack_pointer = nullptr;

  void begin(char* stack, std::size_t bytes, void (*entry)()) {
    auto** top = reinterpret_cast<void**>(reinterpret_cast<std::uintptr_t>(stack + bytes) & ~std::uintptr_t{15});
    *--top = nullptr;  // entry() finds the stack aligned as behind a call
    *--top = reinterpret_cast<void*>(entry);
    for (int kept = 0; kept < 6; ++kept) *--top = nullptr;
    stack_pointer = top;
  }
};
extern "C" void simt_switch(Context* from, const Context* to);
__asm__(R"(
.text
.weak simt_switch
simt_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi); mov (%rsi), %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");
#else
struct Context {
  ucontext_t of{};

  void begin(char* stack, std::size_t bytes, void (*entry)()) {
    getcontext(&of);
    of.uc_stack.ss_sp = stack, of.uc_stack.ss_size = bytes, of.uc_link = nullptr;
    makecontext(&of, entry, 0);
  }
};
inline void simt_switch(Context* from, const Context* to) { swapcontext(&from->of, &to->of); }
#endif

// Whether who goes on thereby knows what was done before: the scheduler does, a thread does not.
enum class Knows : unsigned { all = 0, nothing = 1 };

// A stack of its own, kept from kernel to kernel, and an identity of its own for each.
class Fiber {
 public:
  static constexpr std::size_t kStackBytes = 64 * 1024;

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    if (identity_ != nullptr) __tsan_destroy_fiber(identity_);
  }

  void begin(void (*entry)()) {
    if (stack_ == nullptr) stack_.reset(new char[kStackBytes]);
    if (identity_ != nullptr) __tsan_destroy_fiber(identity_);
    identity_ = __tsan_create_fiber(0);
    context_.begin(stack_.get(), kStackBytes, entry);
  }
  // That of the OS thread itself.
  void be_current() { identity_ = __tsan_get_current_fiber(), is_main_ = true; }
  void release_main() { identity_ = is_main_ ? nullptr : identity_; }

  // A function of its own: identity and stack change together.
  __attribute__((noinline, no_sanitize("thread"))) void switch_to(Fiber& other, Knows knows) {
    __tsan_switch_to_fiber(other.identity_, static_cast<unsigned>(knows));
    simt_switch(&context_, &other.context_);
  }

 private:
  Context context_;
  std::unique_ptr<char[]> stack_;
  void* identity_ = nullptr;
  bool is_main_ = false;
};

// Runs f as somebody of whom no thread knows.
class Apart {
 public:
  Apart() : identity_(__tsan_create_fiber(0)) {}
  Apart(const Apart&) = delete;
  Apart& operator=(const Apart&) = delete;
  ~Apart() { __tsan_destroy_fiber(identity_); }

  template <class F>
  void run(const F& f) const {
    void* const before = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(identity_, static_cast<unsigned>(Knows::nothing));
    f();
    __tsan_switch_to_fiber(before, static_cast<unsigned>(Knows::all));
  }

 private:
  void* identity_;
};

}  // namespace simt
