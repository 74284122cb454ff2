// Threads with small stacks: every public function runs in 64 KB, with any kernels.
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <type_traits>

#include "all_passes.hpp"
#include "every_call.hpp"
#include "expect.hpp"

namespace {

using namespace batchnorm;

// More than any frame: a smaller one might be stepped over.
constexpr std::size_t kGuard = std::size_t{4} << 20;

// Runs f on a thread with a stack of that size, below which memory is guarded.
template <class F>
void run_on_stack(std::size_t bytes, const F& f) {
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, bytes);
  pthread_attr_setguardsize(&attributes, kGuard);
  pthread_t thread;
  const auto run = [](void* context) -> void* {
    (*static_cast<const F*>(context))();
    return nullptr;
  };
  const int failed = pthread_create(&thread, &attributes, run, const_cast<F*>(&f));
  pthread_attr_destroy(&attributes);
  if (failed != 0) return expect::fail(__FILE__, __LINE__, "there is no thread with such a stack");
  pthread_join(thread, nullptr);
}

template <class T>
void run_every_call(std::size_t bytes) {
  using all_passes::Kind;
  for (const Problem& p : {Problem{3, 20, 20}, Problem{40, 7, 1}, Problem{2, 3, 5000}, Problem{90, 70, 1},
                           Problem{9, 9, 7}, Problem{5000, 3, 1}, Problem{60, 20, 40}}) {
    for (const Kind kind : {Kind::ordinary, Kind::huge_mean, Kind::cancelling, Kind::wide}) {
      every_call::Arguments<T> arguments(p);
      arguments.x = all_passes::make_batch<T>(p, kind).x;
      for (const int threads : {1, 3}) {
        const auto calls = every_call::of<T>(arguments, {threads});
        run_on_stack(bytes, [&calls] {
          for (const every_call::NamedCall& call : calls) call.run();
        });
      }
    }
  }
}

template <class T>
void check_every_call() {
  const char* bytes = std::getenv("STACK_BYTES");  // to measure
  run_every_call<T>(bytes == nullptr ? 64 * 1024 : static_cast<std::size_t>(std::atol(bytes)));
  EXPECT(true);
}

TEST(float32_runs_on_64_kilobytes) { check_every_call<float>(); }
TEST(float64_runs_on_64_kilobytes) { check_every_call<double>(); }
TEST(float16_runs_on_64_kilobytes) { check_every_call<Float16>(); }
TEST(bfloat16_runs_on_64_kilobytes) { check_every_call<BFloat16>(); }

// The child's only thread is its main thread, with the stack of the thread that forked.
TEST(a_child_forked_from_64_kilobytes_runs_too) {
  every_call::Arguments<double> arguments(Problem{60, 20, 40});
  const auto calls = every_call::of<double>(arguments, {2});
  int status = -1;
  run_on_stack(64 * 1024, [&] {
    const pid_t child = fork();
    if (child == 0) {
      for (const every_call::NamedCall& call : calls) call.run();
      _exit(0);
    }
    waitpid(child, &status, 0);
  });
  EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0, status);
}

}  // namespace

int main(int argc, char** argv) { return expect::run_tests(argc > 1 ? argv[1] : nullptr); }
