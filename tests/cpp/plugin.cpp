// A plugin that calls the library, and a program that unloads it while the library's threads are about.
#include <cstdio>
#include <vector>

#ifdef IS_PLUGIN
#include "batchnorm/batchnorm.hpp"

extern "C" __attribute__((visibility("default"))) double mean_of_ones() {
  const batchnorm::Problem p{64, 8, 1024};
  const std::vector<float> x(static_cast<std::size_t>(p.size()), 1.0f);
  std::vector<batchnorm::Moments> out(8);
  batchnorm::moments<float>(x, p, out, {.threads = 4});
  return out[7].mean;
}
#else
#include <dlfcn.h>
#include <unistd.h>

int main(int, char** arguments) {
  for (int k = 0; k < 20; ++k) {
    void* plugin = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
    if (plugin == nullptr) return std::printf("%s\n", dlerror()), 1;
    const auto f = reinterpret_cast<double (*)()>(dlsym(plugin, "mean_of_ones"));
    if (f == nullptr || f() != 1) return std::printf("the plugin does not work\n"), 1;
    dlclose(plugin);
    usleep(1000);  // in which threads that have just worked look for more, and then go to sleep
  }
  return 0;
}
#endif
