#include "team.hpp"

#include <chrono>
#include <filesystem>
#include <fstream>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bench {
namespace {

using Clock = std::chrono::steady_clock;

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Spins for 50 us, then sleeps, until `value` is no longer `old`.
int changed(const std::atomic<int>& value, int old) {
  constexpr auto kSpin = std::chrono::microseconds(50);
  constexpr int kLooksPerClock = 32;
  for (const auto start = Clock::now(); Clock::now() - start < kSpin;) {
    for (int k = 0; k < kLooksPerClock; ++k) {
      if (const int now = value.load(std::memory_order_acquire); now != old) return now;
      relax();
    }
  }
  value.wait(old, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

// Threads of this process that run or want to: state R in /proc/self/task/<thread>/stat, after the name in brackets.
int running_threads() {
  int running = 0;
  std::error_code gone;  // a thread may end meanwhile
  for (const auto& thread : std::filesystem::directory_iterator("/proc/self/task", gone)) {
    std::ifstream file(thread.path() / "stat");
    std::string line;
    std::getline(file, line);
    const auto name_end = line.rfind(')');
    running += name_end != std::string::npos && name_end + 2 < line.size() && line[name_end + 2] == 'R';
  }
  return running;
}

}  // namespace

Team::Team(int threads) {
  for (int t = 1; t < threads; ++t) workers_.emplace_back([this, t] { work(t); });
}

Team::~Team() {
  over_ = true;
  runs_.fetch_add(1, std::memory_order_release);
  runs_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Team::run(int threads, const std::function<void(int)>& part) {
  if (threads == 1) return part(0);
  part_ = &part;
  threads_ = threads;
  unfinished_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  runs_.fetch_add(1, std::memory_order_release);
  runs_.notify_all();
  part(0);
  while (unfinished_.load(std::memory_order_acquire) != 0) relax();
}

void Team::work(int t) {
  for (int seen = 0;;) {
    seen = changed(runs_, seen);
    if (over_) return;
    if (t < threads_) (*part_)(t);
    unfinished_.fetch_sub(1, std::memory_order_release);
  }
}

bool wait_until_others_sleep() {
  constexpr auto kPatience = std::chrono::milliseconds(500);
  for (const auto start = Clock::now(); Clock::now() - start < kPatience;) {
    if (running_threads() <= 1) return true;
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  return false;
}

}  // namespace bench
