// Arrays that end, or start, exactly at a page whose touch ends the program, with bytes around them that are checked.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace guarded {

enum class Place { ends_at_guard, starts_at_guard, unaligned };
constexpr Place kPlaces[] = {Place::ends_at_guard, Place::starts_at_guard, Place::unaligned};

inline const char* name(Place place) {
  switch (place) {
    case Place::ends_at_guard:
      return "ends at the guard page";
    case Place::starts_at_guard:
      return "starts at the guard page";
    default:
      return "at an unaligned address";
  }
}

// Where the elements of a piece lie: `count` stretches of `length` elements, `stride` apart, behind `lead` others.
struct Strided {
  std::int64_t length, count, stride, lead = 0;

  [[nodiscard]] std::int64_t extent() const {
    return lead + (length == 0 || count == 0 ? 0 : (count - 1) * stride + length);
  }
  [[nodiscard]] std::int64_t elements() const { return length * count; }
  // f(position in memory, position among the elements).
  template <class F>
  void for_each(F&& f) const {
    for (std::int64_t k = 0; k < count; ++k) {
      for (std::int64_t i = 0; i < length; ++i) f(lead + k * stride + i, k * length + i);
    }
  }
};

// What fills memory that no kernel may read or write: a NaN in float32 and float64.
constexpr int kCanary = 0xff;

// One array at a time, in pages of its own between two guard pages.
template <class T>
class Array {
 public:
  Array() {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t inside = (kBytes + page - 1) / page * page;
    void* all = mmap(nullptr, inside + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) throw std::runtime_error("mmap failed");
    begin_ = static_cast<std::byte*>(all) + page;
    end_ = begin_ + inside;
    if (mprotect(begin_, inside, PROT_READ | PROT_WRITE) != 0) throw std::runtime_error("mprotect failed");
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  // A copy of `content` with canaries around it, as far as a kernel could reach by mistake. `skew` tells the unaligned
  // addresses of a call's arrays apart.
  T* place(const std::vector<T>& content, Place place, std::size_t skew = 1) {
    count_ = content.size();
    const std::size_t bytes = count_ * sizeof(T);
    if (bytes + kAround > static_cast<std::size_t>(end_ - begin_)) throw std::length_error("array too small");
    std::byte* start = place == Place::ends_at_guard     ? end_ - bytes
                       : place == Place::starts_at_guard ? begin_
                                                         : begin_ + (2 * (skew % 8) + 1) * alignof(T);
    first_ = start - std::min<std::ptrdiff_t>(start - begin_, kAround);
    last_ = start + bytes + std::min<std::ptrdiff_t>(end_ - (start + bytes), kAround);
    std::memset(first_, kCanary, static_cast<std::size_t>(last_ - first_));
    data_ = reinterpret_cast<T*>(start);
    if (bytes > 0) std::memcpy(start, content.data(), bytes);
    before_.assign(first_, last_);
    return data_;
  }

  // The elements of a piece, one after the other.
  [[nodiscard]] std::vector<T> elements(const Strided& piece) const {
    std::vector<T> found(static_cast<std::size_t>(piece.elements()));
    piece.for_each([&](std::int64_t at, std::int64_t e) { found.data()[e] = data_[at]; });
    return found;
  }
  [[nodiscard]] const T* data() const { return data_; }
  [[nodiscard]] std::vector<T> all() const { return std::vector<T>(data_, data_ + count_); }

  [[nodiscard]] bool untouched() const {
    return before_.empty() || std::memcmp(first_, before_.data(), before_.size()) == 0;
  }
  // Whether nothing but the elements of the piece has changed.
  [[nodiscard]] bool untouched_outside(const Strided& piece) {
    const std::byte* before = before_.data() + (reinterpret_cast<std::byte*>(data_) - first_);
    piece.for_each([&](std::int64_t at, std::int64_t) {
      std::memcpy(data_ + at, before + at * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
    });
    return untouched();
  }

 private:
  static constexpr std::size_t kBytes = 64 * 1024;
  static constexpr std::ptrdiff_t kAround = 256;

  std::byte *begin_ = nullptr, *end_ = nullptr, *first_ = nullptr, *last_ = nullptr;
  T* data_ = nullptr;
  std::size_t count_ = 0;
  std::vector<std::byte> before_;
};

// Told when a guard page is touched: what the program was doing.
inline std::string (*describe_call)() = nullptr;

inline void report_faults() {
  struct sigaction action{};
  action.sa_handler = [](int) {
    // The program ends here, so that allocating in a handler harms nobody.
    std::printf("memory outside of an array was touched: %s\n0 passed, 1 failed\n", describe_call().c_str());
    std::fflush(stdout);
    _exit(1);
  };
  for (const int fault : {SIGSEGV, SIGBUS}) sigaction(fault, &action, nullptr);
}

}  // namespace guarded
