// Memory of one call: a small buffer on the caller's stack, the heap beyond it; or what a larger call has for its
// parts.
#pragma once

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

}  // namespace batchnorm
