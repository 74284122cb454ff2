// Whether the machine was ours alone.
#pragma once

namespace bench {

// Processors that others (processes, or machines on the same host) kept busy on average since the construction.
class OthersLoad {
 public:
  OthersLoad();
  [[nodiscard]] double processors() const;  // 0 where the system does not tell

 private:
  struct Seconds {
    double clock, machine, own;
  };
  static Seconds now();
  Seconds start_;
};

}  // namespace bench
