// What this build is: names of the kernel list, threads, compiler.
#include "batchnorm/info.hpp"

#include "batchnorm/version.hpp"
#include "check.hpp"
#include "dispatch.hpp"
#include "machine.hpp"
#include "parallel.hpp"
#include "plan.hpp"

namespace batchnorm {

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Implementation& implementation : implementations()) names.emplace_back(implementation.name);
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Implementation& implementation : implementations()) {
    if (machine_runs(implementation.name)) names.emplace_back(implementation.name);
  }
  return names;
}

std::string active_isa() { return active_implementation().name; }

void set_num_threads(int threads) {
  check::threads(threads);
  set_thread_limit(threads);
}

int get_num_threads() { return available_threads(0); }

int threads_worked() { return widest_call(); }

BuildInfo build_info() {
#ifdef NDEBUG
  constexpr bool assertions = false;
#else
  constexpr bool assertions = true;
#endif
  return {BATCHNORM_VERSION, BATCHNORM_COMPILER, BATCHNORM_FLAGS, BATCHNORM_BUILD_TYPE, has_openmp(), assertions};
}

std::string explain(const Problem& problem, std::size_t item_size, const Options& options) {
  check::problem(problem);
  check::item_size(item_size);
  check::threads(options.threads);
  const Work training{true, true, 2, static_cast<std::int64_t>(item_size)};
  return to_string(make_plan(problem, training, options.threads));
}

}  // namespace batchnorm
