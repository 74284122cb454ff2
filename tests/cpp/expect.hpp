// Test cases named as claims, and what they expect. A test program is a file of TESTs and a main that returns
// expect::run_tests(); each failure is printed with its place and values, and makes the exit code 1.
#pragma once

#include <cstdio>
#include <exception>
#include <sstream>
#include <string>
#include <vector>

namespace expect {

struct Case {
  const char* claim;
  void (*run)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> list;
  return list;
}

struct Registered {
  Registered(const char* claim, void (*run)()) { cases().push_back({claim, run}); }
};

// Failures of the running case. Expectations belong to the thread that runs the case.
inline int failures = 0;
constexpr int kFailuresPrinted = 8;

template <class... Part>
std::string text(const Part&... part) {
  std::ostringstream s;
  s.precision(17);
  (s << ... << part);
  return s.str();
}

inline void fail(const char* file, int line, const std::string& what) {
  if (++failures <= kFailuresPrinted) std::printf("%s:%d: %s\n", file, line, what.c_str());
  if (failures == kFailuresPrinted + 1) std::printf("%s:%d: (more failures of this case are not shown)\n", file, line);
  std::fflush(stdout);
}

// What an expression throws: the text of its std::exception, or "" where it throws nothing.
template <class Exception, class F>
std::string thrown_by(F&& f) {
  try {
    f();
  } catch (const Exception& error) {
    return error.what();
  }
  return "";
}

// Runs the cases, or those whose claim contains `wanted`.
inline int run_tests(const char* wanted = nullptr) {
  int passed = 0, failed = 0;
  for (const Case& test : cases()) {
    if (wanted != nullptr && std::string(test.claim).find(wanted) == std::string::npos) continue;
    failures = 0;
    try {
      test.run();
    } catch (const std::exception& error) {
      fail(test.claim, 0, text("threw ", error.what()));
    }
    ++(failures == 0 ? passed : failed);
    if (failures > 0) std::printf("failed: %s\n", test.claim);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace expect

// TEST(the_claim_in_snake_case) { ... }
#define TEST(claim)                                           \
  static void claim();                                        \
  static const expect::Registered claim##_is_(#claim, claim); \
  static void claim()

// EXPECT(condition, values that explain it...); the values are only looked at on failure.
#define EXPECT(condition, ...)                                                                                     \
  do {                                                                                                             \
    if (!(condition)) expect::fail(__FILE__, __LINE__, expect::text(#condition, "  " __VA_OPT__(, ) __VA_ARGS__)); \
  } while (false)

#define EXPECT_EQUAL(got, wanted, ...)                                                                         \
  do {                                                                                                         \
    const auto& got_ = got;                                                                                    \
    const auto& wanted_ = wanted;                                                                              \
    if (!(got_ == wanted_)) {                                                                                  \
      expect::fail(__FILE__, __LINE__,                                                                         \
                   expect::text(#got, " must be ", wanted_, ", got ", got_, "  " __VA_OPT__(, ) __VA_ARGS__)); \
    }                                                                                                          \
  } while (false)

// EXPECT_THROWS(std::invalid_argument, "the whole text", expression).
#define EXPECT_THROWS(exception, wanted_text, ...) \
  EXPECT_EQUAL((expect::thrown_by<exception>([&] { __VA_ARGS__; })), std::string(wanted_text), #__VA_ARGS__)
