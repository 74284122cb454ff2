#include "timing.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "team.hpp"

namespace bench {
namespace {

double seconds_of(const std::function<void()>& work, int repeats) {
  const auto start = std::chrono::steady_clock::now();
  for (int k = 0; k < repeats; ++k) work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / repeats;
}

// How often a work is called for one sample, which lasts at least this long: far above the clock's resolution.
int repeats_of(const std::function<void()>& work) {
  constexpr double kShortestSample = 200e-6;
  constexpr int kMost = 100000;
  seconds_of(work, 1);
  for (int repeats = 1;;) {
    const double once = std::max(seconds_of(work, repeats), 1e-9);
    if (once * repeats >= kShortestSample || repeats == kMost) return repeats;
    repeats = std::clamp(static_cast<int>(std::ceil(1.2 * kShortestSample / once)), repeats + 1, kMost);
  }
}

// Calls before a sample: one, or as many as it takes until a thread that slept runs, on a core of its own. On a virtual
// machine that took up to 300 us, and a few hundred more until the scheduler had moved it.
void warm_up(const std::function<void()>& work) {
  constexpr double kLongEnough = 1.5e-3;
  const auto start = std::chrono::steady_clock::now();
  do {
    work();
  } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < kLongEnough);
}

double median_of(Samples values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2 == 1) return *middle;
  return (*middle + *std::max_element(values.begin(), middle)) / 2;
}

}  // namespace

Spread spread_of(Samples values) {
  const double median = median_of(values);
  for (double& value : values) value = std::abs(value - median);
  return {median, median_of(std::move(values))};
}

std::vector<Samples> time_in_turns(const std::vector<std::function<void()>>& works, int rounds, bool& disturbed) {
  std::vector<int> repeats;
  for (const auto& work : works) repeats.push_back(repeats_of(work));
  std::vector<Samples> samples(works.size());
  for (int round = 0; round < rounds; ++round) {
    for (std::size_t w = 0; w < works.size(); ++w) {
      disturbed |= !wait_until_others_sleep();
      warm_up(works[w]);
      samples[w].push_back(seconds_of(works[w], repeats[w]));
    }
  }
  return samples;
}

}  // namespace bench
