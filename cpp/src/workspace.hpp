// Memory of one call: a small buffer on the caller's stack, the heap beyond it; or what a larger call has for its
// parts.
#pragma once

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace batchnorm {

// Hands out memory that somebody has, piece by piece.
class Workspace {
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, kAlign); }
  };

 public:
  // Heap memory that begins with a cache line. Throws std::bad_alloc.
  using Heap = std::unique_ptr<std::byte, Free>;
  static Heap allocate(std::size_t bytes) { return Heap(static_cast<std::byte*>(::operator new(bytes, kAlign))); }

  explicit Workspace(std::byte* memory) : next_(memory) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // Bytes that take<T>(count) uses.
  template <class T>
  static constexpr std::size_t bytes_for(std::int64_t count) {
    constexpr auto line = static_cast<std::size_t>(kAlign);
    return (static_cast<std::size_t>(count) * sizeof(T) + line - 1) / line * line;
  }
  // The next `count` values, uninitialized, on a cache line of their own. There are enough bytes.
  template <class T>
  T* take(std::int64_t count) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += bytes_for<T>(count);
    return p;
  }

 protected:
  std::byte* next_;
};

// That of a pass.
class PassWorkspace : public Workspace {
 public:
  // What fits on the stack.
  static constexpr std::size_t kOnStack = 16 * 1024;

  // Holds `bytes` in all; throws std::bad_alloc where the heap has not that much. `given`: so many bytes at a line's
  // begin, to be used instead of the heap; or null.
  explicit PassWorkspace(std::size_t bytes, std::byte* given = nullptr) : Workspace(stack_) {
    if (bytes <= kOnStack) return;
    if (given == nullptr) heap_ = allocate(bytes);
    next_ = given == nullptr ? heap_.get() : given;
  }

 private:
  alignas(64) std::byte stack_[kOnStack];
  Heap heap_;
};

// That of each of the threads that work on a call, at most 64: as much for each, asked for before any begins.
class ThreadMemory {
 public:
  // Throws std::bad_alloc. Of no bytes there is none.
  ThreadMemory(std::size_t bytes, int threads) : bytes_(Workspace::bytes_for<std::byte>(bytes_of(bytes))) {
    if (bytes == 0) return;
    std::size_t all = 0;
    if (__builtin_mul_overflow(bytes_, static_cast<std::size_t>(threads), &all)) throw std::bad_alloc();
    memory_ = Workspace::allocate(all);
    free_.store(~std::uint64_t{0} >> (64 - threads), std::memory_order_relaxed);
  }

  // A thread's, from here to the end of the block. There are as many as threads, so that one is free.
  class Place {
   public:
    explicit Place(ThreadMemory& memory) : memory_(memory), at_(memory.memory_ == nullptr ? 0 : memory.take()) {}
    ~Place() {
      if (memory_.memory_ != nullptr) memory_.free_.fetch_or(std::uint64_t{1} << at_, std::memory_order_release);
    }
    Place(const Place&) = delete;
    Place& operator=(const Place&) = delete;
    // Begins with a cache line; null where there is none.
    [[nodiscard]] std::byte* begin() const {
      return memory_.memory_ == nullptr ? nullptr
                                        : memory_.memory_.get() + static_cast<std::size_t>(at_) * memory_.bytes_;
    }

   private:
    ThreadMemory& memory_;
    int at_;
  };

 private:
  static std::int64_t bytes_of(std::size_t bytes) { return static_cast<std::int64_t>(bytes); }
  int take() {
    std::uint64_t free = free_.load(std::memory_order_relaxed);
    while (
        !free_.compare_exchange_weak(free, free & (free - 1), std::memory_order_acquire, std::memory_order_relaxed)) {
    }
    return std::countr_zero(free);
  }

  std::size_t bytes_;
  Workspace::Heap memory_;
  std::atomic<std::uint64_t> free_{0};  // bits of places
};

}  // namespace batchnorm
