// The yardstick's own threads, and a wait until no thread of this process runs but the caller.
//
// What is measured has threads of its own, and threads that wait by spinning take the core of whoever is measured next.
// So these spin for no longer than the gap between two calls, then sleep; and before another thing is measured,
// wait_until_others_sleep() looks at the process instead of trusting anyone's waiting time.
#pragma once

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace bench {

class Team {
 public:
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  [[nodiscard]] int size() const { return static_cast<int>(workers_.size()) + 1; }
  // part(t) for each t below `threads` (at most size()), at the same time, part(0) in the calling thread.
  void run(int threads, const std::function<void(int)>& part);

 private:
  void work(int t);

  const std::function<void(int)>* part_ = nullptr;
  int threads_ = 1;  // of this run
  bool over_ = false;
  std::atomic<int> runs_{0}, unfinished_{0};
  std::vector<std::thread> workers_;
};

// False where they still run after half a second.
bool wait_until_others_sleep();

}  // namespace bench
