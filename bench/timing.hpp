// Timing: samples of several things taken in turns, so that a disturbance hits all of them; median and spread.
#pragma once

#include <functional>
#include <vector>

namespace bench {

// Seconds of one call, one number a round.
using Samples = std::vector<double>;

struct Spread {
  double median;
  double mad;  // median absolute deviation from it
};
Spread spread_of(Samples values);

// Each of `works`, in `rounds` rounds in which all take their turn. A turn begins when all other threads of the process
// sleep; then come calls that are not timed, one at least and for 1.5 ms, which wake the threads and fill the caches,
// and at once the timed one. Short works are called several times there, until the clock's resolution is far below.
// `disturbed` is set where threads would not sleep.
std::vector<Samples> time_in_turns(const std::vector<std::function<void()>>& works, int rounds, bool& disturbed);

}  // namespace bench
