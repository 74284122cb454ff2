// Plans (plan.hpp): pieces cover a tensor exactly once, their geometry is a function of the problem alone, and threads
// are asked for only where there is work.
#include "plan.hpp"

#include <cstdint>
#include <string>
#include <vector>

#include "batchnorm/info.hpp"
#include "expect.hpp"

namespace {

using namespace batchnorm;

constexpr Machine kMachine{1 << 20, 32 << 20};
constexpr Machine kMachines[] = {
    {1, 1}, {256 * 1024, 4 << 20}, {1 << 20, 32 << 20}, {std::int64_t{1} << 40, std::int64_t{1} << 40}};
constexpr int kThreads[] = {1, 2, 3, 7, 64, 1000};
// moments, normalize, batch_norm, grad_sums, grad_input, batch_norm_backward; float and double.
constexpr Work kWorks[] = {{true, false, 1, 4}, {false, true, 2, 4}, {true, true, 2, 4},
                           {true, false, 2, 8}, {false, true, 3, 8}, {true, true, 3, 8}};
constexpr Work kTraining{true, true, 2, 4}, kBackward{true, true, 3, 4};

std::string text(const Problem& p) { return expect::text("{", p.outer, ", ", p.channels, ", ", p.inner, "}"); }

// Small enough to look at every value: sizes around a vector (16), a short row (128), a row of the kernels, a chunk
// (4096), a tile (16384) and nothing.
std::vector<Problem> small_problems() {
  std::vector<Problem> list;
  for (const std::int64_t outer : {0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 130, 1025}) {
    for (const std::int64_t channels : {0, 1, 2, 3, 7, 16, 17, 64, 127, 128, 129}) {
      for (const std::int64_t inner : {0, 1, 2, 5, 15, 16, 17, 31, 49, 128}) {
        if (outer * channels * inner <= 200'000) list.push_back({outer, channels, inner});
      }
    }
  }
  for (const std::int64_t edge : {4 * 1024 - 1, 4 * 1024, 4 * 1024 + 1, 16 * 1024, 16 * 1024 + 1, 40 * 1024 + 7}) {
    for (const Problem& p : {Problem{1, 1, edge}, Problem{edge, 1, 1}, Problem{1, 3, edge}, Problem{3, 2, edge},
                             Problem{edge, 2, 1}, Problem{edge, 3, 2}, Problem{1, edge, 1}, Problem{2, edge, 3}}) {
      list.push_back(p);
    }
  }
  return list;
}

// Near 2^40 values and more; nobody allocates them.
std::vector<Problem> huge_problems() {
  constexpr std::int64_t kOne = 1;
  return {{kOne << 40, 1, 1},          {1, 1, kOne << 40},
          {1, kOne << 40, 1},          {(kOne << 40) + 1, 3, 1},
          {(kOne << 33) + 7, 64, 1},   {1, 2, (kOne << 39) + 5},
          {kOne << 20, 2, kOne << 19}, {(kOne << 31) + 1, 8, 17},
          {kOne << 22, 1 << 17, 2},    {(kOne << 20) + 3, 1000, 16},
          {3, (kOne << 36) + 1, 5},    {kOne << 24, 256, 196},
          {(kOne << 36) - 1, 127, 1},  {1, kOne << 30, 1024},
          {(kOne << 40) - 1, 17, 1},   {1 << 10, 1 << 10, kOne << 20}};
}

std::vector<Problem> all_problems() {
  std::vector<Problem> list = small_problems();
  for (const Problem& p : huge_problems()) list.push_back(p);
  return list;
}

bool is_interleaved(const Plan& plan) { return plan.path == Path::row_blocks; }

// How often the pieces of a plan hold each value. The channel that a piece gives a value must be the value's own.
std::vector<int> visits(const Plan& plan, const RowCut& cut, const RunCut& run_cut, const Problem& problem) {
  std::vector<int> seen(static_cast<std::size_t>(problem.size()), 0);
  const std::int64_t end = problem.size();
  const auto see = [&](std::int64_t at, std::int64_t channel) {
    const bool inside = at >= 0 && at < end;
    EXPECT(inside, "value ", at, " of ", text(problem));
    if (!inside) return;
    EXPECT_EQUAL(channel, at / problem.inner % problem.channels, "channel of value ", at, " of ", text(problem));
    ++seen.data()[at];
  };
  if (is_interleaved(plan)) {
    for (std::int64_t b = 0; b < cut.blocks; ++b) {
      const kernels::Rows rows = cut.block(b);
      EXPECT(rows.count >= 1 && rows.columns >= 1 && rows.columns <= cut.columns, "block ", b, " of ", text(problem));
      for (std::int64_t r = 0; r < rows.count; ++r) {
        for (std::int64_t e = 0; e < rows.columns; ++e) {
          see(cut.offset(b) + r * rows.stride + e, e / plan.problem.inner % plan.problem.channels);
        }
      }
    }
  } else if (plan.planar()) {
    for (std::int64_t c = 0; c < plan.problem.channels; ++c) {
      for (std::int64_t k = 0; k < run_cut.chunks; ++k) {
        const auto [begin, runs] = run_cut.chunk(plan.problem, k, {c, c + 1});
        EXPECT(runs.count >= 1 && runs.length >= 1, "chunk ", k, " of ", text(problem));
        for (std::int64_t r = 0; r < runs.count; ++r) {
          for (std::int64_t i = 0; i < runs.length; ++i) see(begin + r * runs.stride + i, c);
        }
      }
    }
  }
  return seen;
}

// What decides the order of summation.
std::string geometry(const Plan& p) {
  const RowCut& rows = p.sum_rows;
  const RunCut& runs = p.sum_runs;
  return expect::text(text(p.problem), " ", is_interleaved(p), " ", runs.piece_length, " ", runs.runs_per_chunk, " ",
                      runs.pieces_per_run, " ", runs.chunks, " ", rows.repeat, " ", rows.columns, " ", rows.rows, " ",
                      rows.block_rows, " ", rows.full_blocks, " ", rows.rest_rows, " ", rows.blocks);
}

std::int64_t tasks(const Plan& plan) {
  switch (plan.path) {
    case Path::nothing:
      return 1;
    case Path::channel_tasks:
      return plan.groups();
    case Path::chunk_tasks:
      return plan.groups() *
             std::max((plan.sum_runs.chunks + plan.chunks_together - 1) / plan.chunks_together, plan.apply_runs.chunks);
    default:
      return std::max(plan.sum_rows.blocks * plan.stripes, plan.apply_rows.blocks);
  }
}

// f(plan, problem, work, threads asked for) over everything.
template <class F>
void for_each_plan(F&& f) {
  for (const Problem& problem : all_problems()) {
    for (const Work& work : kWorks) {
      for (const Machine& machine : kMachines) {
        for (const int threads : kThreads) f(make_plan(problem, work, machine, threads), problem, work, threads);
      }
    }
  }
}

TEST(pieces_hold_every_value_once_and_know_its_channel) {
  for (const Problem& problem : small_problems()) {
    for (const Work& work : {kTraining, kWorks[0], kWorks[1]}) {
      const Plan plan = make_plan(problem, work, kMachine, 3);
      for (const bool applied : {false, true}) {
        if (applied ? !work.applies : !work.reduces) continue;
        const std::vector<int> seen =
            visits(plan, applied ? plan.apply_rows : plan.sum_rows, applied ? plan.apply_runs : plan.sum_runs, problem);
        for (std::size_t at = 0; at < seen.size(); ++at) {
          EXPECT(seen[at] == 1, "value ", at, " of ", text(problem), " is visited ", seen[at], " times");
        }
      }
    }
  }
}

TEST(pieces_of_huge_problems_add_up_and_end_at_the_end) {
  for (const Problem& problem : huge_problems()) {
    const Plan plan = make_plan(problem, kTraining, kMachine, 8);
    if (is_interleaved(plan)) {
      for (const RowCut& cut : {plan.sum_rows, plan.apply_rows}) {
        const kernels::Rows first = cut.block(0), last = cut.block(cut.blocks - 1);
        const std::int64_t end = cut.offset(cut.blocks - 1) + (last.count - 1) * last.stride + last.columns;
        EXPECT_EQUAL(end, problem.size(), text(problem));
        EXPECT_EQUAL(cut.offset(0), 0, text(problem));
        for (const std::int64_t b : {std::int64_t{0}, cut.blocks / 2, cut.blocks - 2}) {
          if (b < 0 || b + 1 >= cut.blocks) continue;
          const kernels::Rows rows = cut.block(b);
          EXPECT_EQUAL(cut.offset(b) + rows.count * rows.stride, cut.offset(b + 1), text(problem));
        }
        EXPECT(first.count > 0 && last.count > 0, text(problem));
      }
    } else {
      for (const RunCut& cut : {plan.sum_runs, plan.apply_runs}) {
        const std::int64_t k = cut.chunks - 1, c = plan.problem.channels - 1;
        const auto [begin, last] = cut.chunk(plan.problem, k, {c, c + 1});
        EXPECT_EQUAL(cut.chunk(plan.problem, 0, {0, 1}).offset, 0, text(problem));
        EXPECT_EQUAL(begin + (last.count - 1) * last.stride + last.length, problem.size(), text(problem));
        // All chunks but the last of a run, or the last of a channel, are full.
        const std::int64_t full = cut.runs_per_chunk * cut.piece_length, values = problem.count();
        EXPECT(full * cut.chunks >= values, text(problem));
        if (cut.pieces_per_run == 1) EXPECT(full * (cut.chunks - 1) < values, text(problem));
        if (cut.pieces_per_run > 1) EXPECT(full * (cut.pieces_per_run - 1) < plan.problem.inner, text(problem));
      }
    }
  }
}

TEST(what_is_summed_together_is_the_same_for_all_threads_machines_and_passes) {
  std::string expected;
  Problem of{-1, -1, -1};
  for_each_plan([&](const Plan& plan, const Problem& problem, const Work& work, int) {
    if (!work.reduces) return;
    const bool is_new = of.outer != problem.outer || of.channels != problem.channels || of.inner != problem.inner;
    if (is_new) expected = geometry(plan);
    of = problem;
    EXPECT(geometry(plan) == expected, geometry(plan), " and ", expected);
  });
}

TEST(threads_are_at_least_one_and_never_more_than_asked_for_or_than_tasks) {
  for_each_plan([](const Plan& plan, const Problem& problem, const Work&, int threads) {
    EXPECT(plan.threads >= 1 && plan.threads <= threads && plan.threads <= tasks(plan), plan.threads, " threads for ",
           text(problem));
  });
}

TEST(small_problems_are_serial_and_large_ones_are_not) {
  for_each_plan([](const Plan& plan, const Problem& problem, const Work& work, int threads) {
    const std::int64_t bytes = problem.size() * work.item_size * work.streams;
    if (bytes <= 64 * 1024) EXPECT_EQUAL(plan.threads, 1, text(problem));
    if (bytes >= 1024 * 1024 && threads > 1 && tasks(plan) > 1) EXPECT(plan.threads > 1, text(problem));
  });
}

// What the bounds of channel_math.hpp count on.
TEST(a_lane_adds_at_most_1024_values_of_a_piece) {
  for (const Problem& problem : all_problems()) {
    const Plan plan = make_plan(problem, kTraining, kMachine, 8);
    if (is_interleaved(plan)) {
      EXPECT(plan.sum_rows.block_rows <= 1024 && plan.sum_rows.rest_rows <= 1024, text(problem));
    } else if (plan.planar()) {
      EXPECT(plan.sum_runs.runs_per_chunk * ((plan.sum_runs.piece_length + 15) / 16) <= 512, text(problem));
    }
  }
}

TEST(a_channel_that_fits_the_cache_is_reduced_and_applied_by_one_task) {
  EXPECT(make_plan({8, 64, 196}, kTraining, {1 << 20, 32 << 20}, 4).path == Path::channel_tasks);
  EXPECT(make_plan({8, 64, 196}, kTraining, {1024, 1024}, 4).path == Path::chunk_tasks);
  EXPECT(make_plan({8, 2, 50'000}, kTraining, {1 << 30, 1 << 30}, 4).path ==
         Path::chunk_tasks);  // fewer channels than threads
  EXPECT(make_plan({8, 64, 196}, {false, true, 2, 4}, {1 << 20, 32 << 20}, 4).path ==
         Path::chunk_tasks);  // nothing to reduce
}

TEST(as_many_whole_groups_are_worked_on_as_an_eighth_of_the_cache_holds) {
  constexpr Machine kTwoMegabytes{2 << 20, 32 << 20};
  const auto part = [&](const Problem& p, std::int64_t width, std::int64_t problems, std::int64_t bytes, int threads) {
    return channels_a_part(p, width, problems, bytes, kTwoMegabytes, threads);
  };
  EXPECT_EQUAL(part({1, 640, 2304}, 20, 2, 4, 2), 20);   // a group has 184 KB
  EXPECT_EQUAL(part({1, 1280, 576}, 40, 2, 4, 2), 80);   // 92 KB
  EXPECT_EQUAL(part({1, 1280, 576}, 40, 2, 8, 2), 40);   // and as many of dy
  EXPECT_EQUAL(part({1, 1280, 576}, 40, 2, 4, 32), 40);  // 128 parts for 32 threads
  EXPECT_EQUAL(part({1, 256, 147'456}, 8, 1, 4, 2), 8);  // larger than the cache
  EXPECT_EQUAL(part({1, 256, 147'456}, 256, 1, 4, 2), 256);
  EXPECT_EQUAL(part({1, 64, 64}, 4, 9, 4, 2), 64);          // all of a sample fits
  EXPECT_EQUAL(part({1, 65'536, 16}, 4, 1, 4, 2), 65'536);  // short runs are turned
  EXPECT_EQUAL(part({2, 640, 2304}, 20, 1, 4, 2), 640);     // a group has two places
  EXPECT_EQUAL(part({1, 0, 2304}, 1, 1, 4, 2), 0);
}

TEST(a_chunk_of_a_sum_is_what_a_block_of_a_gpu_can_hold) {
  for (const Problem& problem : all_problems()) {
    const RunCut& cut = make_plan(problem, kTraining, kMachine, 8).sum_runs;
    EXPECT(cut.runs_per_chunk * cut.piece_length <= 4096, text(problem));
  }
}

TEST(a_thread_sums_some_chunks_at_a_time_and_applies_larger_ones) {
  const Plan plan = make_plan({64, 2, 49'152}, kTraining, kMachine, 8);
  EXPECT(plan.path == Path::chunk_tasks);
  EXPECT_EQUAL(plan.sum_runs.piece_length, 4096);
  EXPECT_EQUAL(plan.chunks_together, 4);
  EXPECT_EQUAL(plan.apply_runs.piece_length, 16384);
}

// A core's own cache of 2 MB, and a shared one that is far: it has to hold a group and, meanwhile, the next one.
TEST(a_group_and_the_next_one_fit_the_cache_where_the_shared_one_is_far) {
  constexpr Machine kFar{2 << 20, 480 << 20}, kNear{2 << 20, 32 << 20};
  EXPECT_EQUAL(make_plan({32, 256, 3136}, kBackward, kFar, 2).group, 1);  // slabs of 0.8 MB
  EXPECT_EQUAL(make_plan({32, 256, 3136}, kBackward, kNear, 2).group, 2);
  EXPECT_EQUAL(make_plan({32, 256, 3136}, kTraining, kFar, 2).group, 2);  // of 0.4 MB
  // The others of ResNet-50 keep stretches nearly as long.
  for (const Problem& p : {Problem{32, 512, 784}, {32, 512, 196}, {32, 1024, 196}, {32, 2048, 49}, {32, 64, 12544}}) {
    for (const Work& work : {kTraining, kBackward}) {
      EXPECT(make_plan(p, work, kFar, 2).group >= make_plan(p, work, kNear, 2).group * 5 / 6, text(p));
    }
  }
}

TEST(wide_rows_of_few_blocks_are_shared_out_by_columns_for_summing) {
  for (const std::int64_t channels : {1024, 1000, 999, 4099}) {
    const Plan plan = make_plan({64, channels, 1}, kTraining, kMachine, 2);
    EXPECT_EQUAL(plan.sum_rows.blocks, 1);
    EXPECT_EQUAL(plan.threads, 2);
    EXPECT_EQUAL(plan.stripe % kernels::kVectorColumns, 0);
    EXPECT(plan.stripe < channels && plan.stripe * plan.stripes >= channels, plan.stripe);
  }
  EXPECT_EQUAL(make_plan({64, 1024, 1}, kTraining, kMachine, 1).stripe, 1024);
}

TEST(nothing_is_planned_for_no_values) {
  for (const Problem& problem :
       {Problem{0, 3, 4}, Problem{3, 0, 4}, Problem{3, 4, 0}, Problem{0, 1, 1}, Problem{0, 0, 0}}) {
    const Plan plan = make_plan(problem, kTraining, kMachine, 8);
    EXPECT(plan.path == Path::nothing, text(problem));
    EXPECT_EQUAL(plan.threads, 1, text(problem));
  }
}

TEST(the_text_of_a_plan_names_its_path_and_threads) {
  const auto says = [](const Problem& problem, const Machine& machine, int threads, const std::string& words) {
    const std::string said = to_string(make_plan(problem, kTraining, machine, threads));
    EXPECT(said.find(words) != std::string::npos, said);
    EXPECT(said.find("threads ") != std::string::npos, said);
  };
  says({0, 3, 4}, kMachine, 1, "nothing to do");
  says({8, 64, 196}, kMachine, 4, "a task is 4 channel(s)");
  says({8, 64, 196}, {1024, 1024}, 4, "a task is a chunk");
  says({8, 64, 196}, kMachine, 4, "1 chunk(s) a channel, 8 x 196 values each");
  says({4096, 64, 1}, kMachine, 4, "a task is a block of rows");
  says({4096, 64, 1}, kMachine, 4, "threads 4");
}

// The largest problem that the checks let through has 2^60 - 1 values: its bytes, read and written, exceed 2^63.
TEST(the_largest_allowed_problem_is_planned_for_all_threads) {
  const std::int64_t most = (std::int64_t{1} << 60) - 1;
  for (const Problem& problem : {Problem{1, 1, most}, Problem{most, 1, 1}, Problem{most / 2, 2, 1}}) {
    for (const Work& work : kWorks) EXPECT_EQUAL(make_plan(problem, work, kMachine, 8).threads, 8, text(problem));
  }
}

TEST(only_large_outputs_are_stored_around_the_caches) {
  const auto around = [](const Problem& problem, const Work& work) {
    return make_plan(problem, work, kMachine, 2).around_cache;  // half of 32 MB is the limit here
  };
  EXPECT(around({32, 64, 12544}, kTraining));
  EXPECT(around({401408, 64, 1}, kTraining));
  EXPECT(!around({4, 64, 12544}, kTraining));             // 12 MB
  EXPECT(!around({32, 64, 12544}, {true, false, 1, 4}));  // nothing is written
  EXPECT(around({4096, 2048, 49}, kTraining));            // runs of a stretch make whole lines
  EXPECT(around({401408, 130, 1}, kTraining));
  EXPECT(!around({25088, 128, 1}, kTraining));  // 13 MB twice
  EXPECT(around({25088, 128, 1}, kBackward));   // three times, of which rows are read again
  EXPECT(!around({32, 512, 196}, kBackward));   // planes are not
}

TEST(a_part_of_a_large_tensor_is_stored_as_the_tensor_would_be_and_summed_as_by_itself) {
  const Problem segment{64, 64, 1};
  Work of_large = kTraining, of_small = kTraining;
  of_large.part_of = 401408 * 64;
  of_small.part_of = 4014 * 64;
  const Plan alone = make_plan(segment, kTraining, kMachine, 1);
  EXPECT(!alone.around_cache);
  EXPECT(make_plan(segment, of_large, kMachine, 1).around_cache);
  EXPECT(!make_plan(segment, of_small, kMachine, 1).around_cache);
  EXPECT(geometry(make_plan(segment, of_large, kMachine, 1)) == geometry(alone));
}

TEST(rows_stand_side_by_side_as_long_as_that_leaves_a_visit_of_eight) {
  const auto repeat = [](std::int64_t rows) { return make_plan({rows, 3, 1}, kTraining, kMachine, 1).sum_rows.repeat; };
  EXPECT_EQUAL(repeat(65536), 32);  // 96 columns
  EXPECT_EQUAL(repeat(256), 32);
  EXPECT_EQUAL(repeat(255), 16);  // 48: whole vectors all the same
  EXPECT_EQUAL(repeat(5), 5);
}

TEST(one_thread_alone_applies_blocks_as_large_as_it_sums) {
  EXPECT_EQUAL(make_plan({96, 64, 1}, kTraining, kMachine, 1).apply_rows.block_rows, 64);
  EXPECT_EQUAL(make_plan({512, 64, 1}, kTraining, kMachine, 4).apply_rows.block_rows, 16);
}

TEST(channels_of_one_short_run_are_turned_in_tiles_of_whole_vectors) {
  EXPECT(has_short_runs({1, 2, 2}) && has_short_runs({1, 1000, 31}));
  for (const Problem& p : {Problem{2, 1000, 4}, {1, 1, 4}, {1, 1000, 1}, {1, 1000, 32}})
    EXPECT(!has_short_runs(p), text(p));
  for (std::int64_t length = 2; length < 32; ++length) {
    for (const std::int64_t size : {4, 8}) {
      const std::int64_t runs = runs_of_tile({1, 1000, length}, size);
      EXPECT(runs >= 16 && runs % 16 == 0 && runs <= kMostTurned && runs * length * size <= kTurnedBytes, length);
    }
  }
}

// Else the order of sums would depend on how many runs a tile has.
TEST(turned_runs_are_rows_of_one_block_that_never_stand_side_by_side) {
  Work turned = kTraining;
  turned.is_turned = true;
  for (const Problem& p : {Problem{31, 1, 1}, {16, 3, 1}, {31, 16, 1}, {4, 256, 1}}) {
    const Plan plan = make_plan(p, turned, kMachine, 1);
    EXPECT(plan.path == Path::row_blocks, text(p));
    EXPECT_EQUAL(plan.sum_rows.repeat, 1, text(p));
    EXPECT_EQUAL(plan.sum_rows.blocks, 1, text(p));
  }
}

TEST(a_small_problem_has_the_blocks_that_its_rows_are_summed_in) {
  for (const std::int64_t rows : {1, 64, 65, 256}) {
    for (const std::int64_t channels : {64, 100, 256}) {
      const Problem p{rows, channels, 1};
      const RowCut cut = make_plan(p, kTraining, kMachine, 1).sum_rows;
      EXPECT(is_small(p, kTraining, 1), text(p));
      EXPECT_EQUAL(cut.repeat, 1, text(p));
      EXPECT_EQUAL(cut.block_rows, kBlockRows, text(p));
      EXPECT(cut.blocks <= kSmallBlocks, text(p));
    }
  }
  for (const Problem& p : {Problem{257, 64, 1}, {64, 63, 1}, {64, 257, 1}, {64, 64, 2}}) {
    EXPECT(!is_small(p, kTraining, 1), text(p));
  }
  EXPECT(!is_small({256, 256, 1}, kTraining, 2));  // which threads share
}

}  // namespace

int main(int argc, char** argv) { return expect::run_tests(argc > 1 ? argv[1] : nullptr); }
