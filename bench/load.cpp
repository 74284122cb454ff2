#include "load.hpp"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <string>

namespace bench {
namespace {

double seconds_of(const timeval& time) {
  return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
}

// The first line of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal; in ticks, over all processors.
double busy_ticks() {
  std::ifstream file("/proc/stat");
  std::string name;
  double user = 0, nice = 0, system = 0, idle = 0, iowait = 0, irq = 0, softirq = 0, steal = 0;
  file >> name >> user >> nice >> system >> idle >> iowait >> irq >> softirq >> steal;
  return user + nice + system + irq + softirq + steal;
}

}  // namespace

OthersLoad::OthersLoad() : start_(now()) {}

OthersLoad::Seconds OthersLoad::now() {
  rusage own{};
  getrusage(RUSAGE_SELF, &own);
  const auto clock = std::chrono::steady_clock::now().time_since_epoch();
  return {std::chrono::duration<double>(clock).count(), busy_ticks() / static_cast<double>(sysconf(_SC_CLK_TCK)),
          seconds_of(own.ru_utime) + seconds_of(own.ru_stime)};
}

double OthersLoad::processors() const {
  const Seconds end = now();
  const double others = (end.machine - start_.machine) - (end.own - start_.own);
  return std::max(0.0, others / (end.clock - start_.clock));
}

}  // namespace bench
