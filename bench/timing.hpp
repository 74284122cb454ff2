// Timing: samples of several things taken in turns, so that a disturbance hits all of them; median and spread.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <vector>

namespace bench {

struct Sample {
  double median;  // seconds
  double mad;     // median absolute deviation from it, seconds
};

inline double median_of(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

inline double seconds_of(const std::function<void()>& work, int repeats) {
  const auto start = std::chrono::steady_clock::now();
  for (int k = 0; k < repeats; ++k) work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / repeats;
}

// Median and spread of each of `works`, from `rounds` rounds in which all take their turn.
inline std::vector<Sample> time_in_turns(const std::vector<std::function<void()>>& works, int rounds) {
  // One sample lasts at least this long: far above the clock's resolution.
  constexpr double kShortestSample = 200e-6;
  std::vector<int> repeats;
  for (const auto& work : works) {
    work();
    const double once = seconds_of(work, 1);
    repeats.push_back(std::clamp(static_cast<int>(kShortestSample / std::max(once, 1e-9)), 1, 100000));
  }
  std::vector<std::vector<double>> samples(works.size());
  for (int round = 0; round < rounds; ++round) {
    for (std::size_t w = 0; w < works.size(); ++w) samples[w].push_back(seconds_of(works[w], repeats[w]));
  }
  std::vector<Sample> result;
  for (auto& s : samples) {
    const double median = median_of(s);
    for (double& value : s) value = std::abs(value - median);
    result.push_back({median, median_of(s)});
  }
  return result;
}

}  // namespace bench
