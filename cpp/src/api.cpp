// The public functions: check, run, return.
#include <limits>

#include "batchnorm/batchnorm.hpp"
#include "channel_math.hpp"
#include "check.hpp"
#include "floating_point.hpp"
#include "parallel.hpp"
#include "parts.hpp"
#include "passes.hpp"

namespace batchnorm {
namespace {

template <class T>
T* data_or_null(std::span<T> s) {
  return s.empty() ? nullptr : s.data();
}

std::int64_t bits_bytes(const Problem& problem) {
  // The head, a bit an element, up to 15 bits before them, and what kernels may read behind.
  return kBitsHead + (problem.size() + 15 + 7) / 8 + 4;
}

// A call whose own arguments are found good, as the passes read it: whole, or by segments.
template <class T>
class CheckedCall {
 public:
  CheckedCall(const Call<T>& call, const Options& options) : call_(call), threads_(options.threads) {
    const Problem& p = call.problem;
    check::problem(p);
    check::threads(options.threads);
    if (by_segments()) check::offsets(call.groups.offsets, p);
    check_values("gamma", call.gamma);
    check_values("beta", call.beta);
    check::eps(call.eps);
    check::size_or_absent("residual", call.tail.residual.size(), p);
    if (!call.tail.bits.empty()) check::bits(call.tail.bits.size(), bits_bytes(p), call.tail.relu);
    whole_ = {.problem = p, .padding = call.counted.padding, .gamma = call.gamma, .beta = call.beta, .eps = call.eps};
    if (!call.counted.weights.empty()) sum_weights();
  }

  [[nodiscard]] bool by_segments() const { return !call_.groups.offsets.empty(); }
  // Entries of tables: one per segment and channel.
  [[nodiscard]] std::size_t entries() const {
    const std::size_t groups = by_segments() ? call_.groups.offsets.size() - 1 : 1;
    return groups * static_cast<std::size_t>(call_.problem.channels);
  }
  void check_entries(const char* name, std::size_t got) const {
    by_segments() ? check::entries(name, got, entries()) : check::channels(name, got, call_.problem);
  }
  // Per channel, or per entry.
  void check_values(const char* name, const ChannelValues& values) const {
    if (values.present() && !(by_segments() && values.size() == entries())) {
      check::channels(name, values.size(), call_.problem);
    }
  }
  void check_values(const char* name, const ChannelOutput& values) const {
    if (values.wanted() && !(by_segments() && values.size() == entries())) {
      check::channels(name, values.size(), call_.problem);
    }
  }
  // Those of the entries from `first` on.
  template <class Values>
  [[nodiscard]] Values part_of(const Values& values, std::int64_t first) const {
    const auto channels = static_cast<std::size_t>(call_.problem.channels);
    return values.size() == channels ? values : values.part(static_cast<std::size_t>(first), channels);
  }
  // Moments that are read to take gradients.
  void check_counts(const char* name, std::span<const Moments> moments) const {
    check_entries(name, moments.size());
    if (check::all_count(moments)) return;
    if (!call_.counted.weights.empty()) return check::counts(name, moments);  // perhaps nothing counts
    if (!by_segments()) return check::counts_of_batch(name, moments, call_.problem);
    check::counts(name, moments);
    check::counts_of_segments(name, moments, call_.groups.offsets, call_.problem);
  }
  // A variance is wanted of every group; those of segments may be 0.
  void check_batch() const {
    if (by_segments()) return;
    if (call_.counted.weights.empty()) return check::batch_values(call_.problem);
    check::counted_positions(whole_.summary.counted, call_.problem);
  }
  // What is written shares no memory with what the call is made of.
  void check_apart(std::initializer_list<check::Memory> written) const {
    const check::Memory bits{"bits", call_.tail.relu ? call_.tail.bits : std::span<std::uint8_t>{}};
    for (const check::Memory& output : written) {
      check::apart({output}, {{"gamma", call_.gamma}, {"beta", call_.beta}});
      if (by_segments()) check::apart({output}, {{"offsets", call_.groups.offsets}});
      if (!call_.counted.weights.empty()) check::apart({output}, {{"weights", call_.counted.weights}});
      if (bits.size != 0) check::apart({output}, {bits});
    }
  }

  // Forward: what follows is done, and bits are written.
  void follow(const T* y) {
    whole_.tail.residual = data_or_null(call_.tail.residual);
    whole_.tail.relu = call_.tail.relu;
    if (call_.tail.bits.empty()) return;
    whole_.bits_head = call_.tail.bits.data();
    whole_.tail.bits = call_.tail.bits.data() + kBitsHead;
    if (by_segments()) whole_.tail.first_bit = values_past_line(y);
  }
  // Backward: bits are read.
  void let_through() {
    if (!call_.tail.relu) return;
    check::bits(call_.tail.bits.size(), bits_bytes(call_.problem), true);
    whole_.tail.bits = call_.tail.bits.data() + kBitsHead;
    whole_.tail.first_bit = call_.tail.bits[0] % kernels::kVectorColumns;
  }

  // Forward-mode: the residual is a tangent.
  void follow_along() {
    whole_.tail.residual = data_or_null(call_.tail.residual);
    let_through();
  }

  // f(part, its place in tensors, its place in tables, threads, PartOf). What can fail has been done when the first
  // part begins; before() comes then.
  template <class F, class Before>
  void run(const F& f, const Before& before) const {
    if (!by_segments()) return f(whole_, std::int64_t{0}, std::int64_t{0}, threads_, PartOf{});
    const Problem& p = call_.problem;
    const auto of_segment = [&](std::int64_t s, const Segment& segment, int threads, const PartOf& of) {
      f(part(s, segment), segment.first_row * p.channels * p.inner, s * p.channels, threads, of);
    };
    EachSegment each(call_.groups.offsets, p, threads_, of_segment);
    before();
    each.run();
  }
  template <class F>
  void run(const F& f) const {
    run(f, [] {});
  }

  [[nodiscard]] const Part<T>& whole() const { return whole_; }
  [[nodiscard]] int threads() const { return threads_; }

 private:
  using W = kernels::WeightOf<T>;

  void sum_weights() {
    const std::span<const W> weights = call_.counted.weights;
    check::positions("weights", weights.size(), call_.problem);
    whole_.positions = {.values = weights.data(), .is_mask = true, .problem = call_.problem};
    if (!by_segments()) {
      whole_.summary = checked_summary(weights, 0, threads_);
      whole_.positions.is_mask = whole_.summary.is_mask;
      return;
    }
    const auto offsets = call_.groups.offsets;
    summaries_.reserve(offsets.size() - 1);
    const auto inner = static_cast<std::size_t>(call_.problem.inner);
    for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
      const std::size_t first = static_cast<std::size_t>(offsets[s]) * inner;
      const std::size_t n = static_cast<std::size_t>(offsets[s + 1]) * inner - first;
      summaries_.push_back(checked_summary(weights.subspan(first, n), static_cast<std::int64_t>(first), threads_));
    }
  }
  static WeightSummary checked_summary(std::span<const W> weights, std::int64_t first, int threads) {
    const WeightSummary summary = summarize(weights, threads);
    if (summary.bad >= 0) {
      check::bad_weight(first + summary.bad, static_cast<double>(weights[static_cast<std::size_t>(summary.bad)]));
    }
    check::sum_of_weights(summary.total.hi);
    return summary;
  }

  [[nodiscard]] Part<T> part(std::int64_t s, const Segment& segment) const {
    Part<T> part = whole_;
    const std::int64_t position = segment.first_row * call_.problem.inner, at = position * call_.problem.channels;
    part.problem.outer = segment.rows;
    part.gamma = part_of(call_.gamma, s * call_.problem.channels);
    part.beta = part_of(call_.beta, s * call_.problem.channels);
    if (part.positions) {
      part.summary = summaries_[static_cast<std::size_t>(s)];
      part.positions.values += position;
      part.positions.is_mask = part.summary.is_mask;
    }
    if (part.tail.residual != nullptr) part.tail.residual += at;
    part.tail.first_bit += at;
    part.bits_head = nullptr;
    return part;
  }

  const Call<T>& call_;
  int threads_;
  Part<T> whole_;
  std::vector<WeightSummary> summaries_;
};

// Of bits that segments share.
template <class T>
void write_head(const Part<T>& whole) {
  if (whole.bits_head == nullptr) return;
  std::fill_n(whole.bits_head, kBitsHead, std::uint8_t{0});
  *whole.bits_head = static_cast<std::uint8_t>(whole.tail.first_bit);
}

// y: a tensor, x or the residual itself or apart from all else.
template <class T>
void check_output(const CheckedCall<T>& checked, const Call<T>& call, std::span<const T> x, std::span<T> y) {
  check::output("y", y, call.problem, x, "x");
  if (!call.tail.residual.empty()) {
    check::no_partial_overlap("y", y.data(), "residual", call.tail.residual.data(), y.size_bytes());
  }
  checked.check_apart({{"y", y}});
  if (!call.tail.bits.empty()) {
    check::apart({{"bits", call.tail.bits}},
                 {{"x", x}, {"residual", call.tail.residual}, {"gamma", call.gamma}, {"beta", call.beta}});
    check::apart({{"bits", call.tail.bits}}, {{"weights", call.counted.weights}, {"offsets", call.groups.offsets}});
  }
}

template <class T>
void check_inputs(const Call<T>& call, std::span<const T> dy, std::span<const T> x) {
  check::size("dy", dy.size(), call.problem);
  check::size("x", x.size(), call.problem);
}
// dx and dresidual: dy or x themselves, or apart from all else.
template <class T>
void check_gradients(const CheckedCall<T>& checked, const Call<T>& call, std::span<const T> dy, std::span<const T> x,
                     const Gradients<T>& out) {
  for (const auto& [name, gradient] : {std::pair{"dx", out.dx}, {"dresidual", out.dresidual}}) {
    if (gradient.empty()) continue;
    check::output(name, gradient, call.problem, dy, "dy");
    check::no_partial_overlap(name, gradient.data(), "x", x.data(), x.size_bytes());
  }
  checked.check_values("dgamma", out.dgamma);
  checked.check_values("dbeta", out.dbeta);
  const check::Memory dgamma{"dgamma", out.dgamma}, dbeta{"dbeta", out.dbeta};
  if (out.dgamma.wanted() || out.dbeta.wanted()) check::apart({dgamma, dbeta}, {{"dy", dy}, {"x", x}, {"dx", out.dx}});
  checked.check_apart({{"dx", out.dx}, dgamma, dbeta});
  if (out.dresidual.empty()) return;
  const check::Memory dresidual{"dresidual", out.dresidual};
  check::apart({dresidual}, {{"dx", out.dx}, dgamma, dbeta});
  checked.check_apart({dresidual});
}
template <class T>
FirstOutputs<T> outputs(const Gradients<T>& out, std::int64_t at) {
  return {out.dx.empty() ? nullptr : out.dx.data() + at, out.dresidual.empty() ? nullptr : out.dresidual.data() + at,
          out.dgamma, out.dbeta};
}

void check_given(ChannelValues mean, ChannelValues var, const Problem& problem) {
  check::channels_present("mean", mean, problem);
  check::channels_present("var", var, problem);
  check::variances(var);
}
// With given statistics there is one group, and a weight of 0 says nothing but that the output is something else.
template <class T>
void check_one_group(const Call<T>& call) {
  check::no_offsets(call.groups.offsets.size());
  if (!call.counted.weights.empty()) check::padding_differs(call.counted.padding);
}

template <class T>
void check_jvp(const CheckedCall<T>& checked, const Call<T>& call, std::span<const T> x_dot, std::span<const T> x,
               const Tangents& tangents, std::span<T> y_dot) {
  const Problem& problem = call.problem;
  check::size("x_dot", x_dot.size(), problem);
  check::size("x", x.size(), problem);
  checked.check_values("gamma_dot", tangents.gamma);
  checked.check_values("beta_dot", tangents.beta);
  check::channels_or_absent("mean_dot", tangents.mean, problem);
  check::channels_or_absent("var_dot", tangents.var, problem);
  check::output("y_dot", y_dot, problem, x_dot, "x_dot");
  check::no_partial_overlap("y_dot", y_dot.data(), "x", x.data(), x.size_bytes());
  if (!call.tail.residual.empty()) {
    check::no_partial_overlap("y_dot", y_dot.data(), "residual", call.tail.residual.data(), y_dot.size_bytes());
  }
  check::apart({{"y_dot", y_dot}}, {{"gamma_dot", tangents.gamma},
                                    {"beta_dot", tangents.beta},
                                    {"mean_dot", tangents.mean},
                                    {"var_dot", tangents.var}});
  checked.check_apart({{"y_dot", y_dot}});
}

// Sizes and overlaps of the tensors. ddy is written before dx is computed from v, dy and x.
template <class T>
void check_second_tensors(std::span<const T> v, std::span<const T> dy, std::span<const T> x, const Problem& problem,
                          std::span<T> ddy, std::span<T> dx) {
  check::size("v", v.size(), problem);
  for (const auto& [name, in] : {std::pair{"v", v}, {"dy", dy}, {"x", x}}) {
    if (!ddy.empty()) check::output("ddy", ddy, problem, in, name);
    if (!dx.empty()) check::output("dx", dx, problem, in, name);
    if (!ddy.empty() && !dx.empty()) check::apart({{"ddy", ddy}}, {{name, in}});
  }
  if (!ddy.empty() && !dx.empty()) check::apart({{"ddy", ddy}}, {{"dx", dx}});
}
template <class T>
void check_double_backward(const CheckedCall<T>& checked, const Call<T>& call, std::span<const T> v,
                           std::span<const T> dy, std::span<const T> x, const Cotangents& w, std::span<T> ddy,
                           std::span<T> dx, ChannelOutput dgamma) {
  check::second_order(call.groups.offsets.size(), call.counted.weights.size(), call.tail.relu);
  check_inputs(call, dy, x);
  check::channels_or_absent("v_dgamma", w.dgamma, call.problem);
  check::channels_or_absent("v_dbeta", w.dbeta, call.problem);
  check_second_tensors(v, dy, x, call.problem, ddy, dx);
  if (dgamma.wanted()) check::channels("dgamma", dgamma.size(), call.problem);
  check::apart({{"dgamma", dgamma}}, {{"v", v}, {"dy", dy}, {"x", x}, {"ddy", ddy}, {"dx", dx}});
  for (const check::Memory& output : {check::Memory{"ddy", ddy}, {"dx", dx}, {"dgamma", dgamma}}) {
    check::apart({output}, {{"v_dgamma", w.dgamma}, {"v_dbeta", w.dbeta}});
    checked.check_apart({output});
  }
}

template <class F>
auto in_default_environment(F f) {
  decltype(f()) result{};
  run_here([&] { result = f(); });
  return result;
}

}  // namespace

std::int64_t relu_mask_bytes(const Problem& problem) {
  check::problem(problem);
  return bits_bytes(problem);
}

template <class T>
void moments(std::span<const T> x, const Call<T>& call, std::span<Moments> out, const Options& options) {
  const DefaultFloatingPoint environment;
  const CheckedCall<T> checked(call, options);
  check::size("x", x.size(), call.problem);
  checked.check_entries("out", out.size());
  check::apart({{"out", out}}, {{"x", x}});
  checked.check_apart({{"out", out}});
  checked.run([&](const Part<T>& part, std::int64_t at, std::int64_t entry, int threads,
                  const PartOf& of) { run_moments(x.data() + at, part, out.data() + entry, threads, of); },
              [&] { std::fill(out.begin(), out.end(), Moments{}); });
}

Moments merge(const Moments& a, const Moments& b) {
  return in_default_environment([&] { return merge_moments(a, b); });
}

double variance(const Moments& moments, int ddof) {
  // Of nothing nothing is known: normalizing by infinity gives beta, as batch_norm() does there.
  if (moments.count == 0 && ddof == 0) return std::numeric_limits<double>::infinity();
  return in_default_environment([&] { return variance_of(moments, ddof).hi; });
}

double rstd(const Moments& moments, double eps) {
  if (moments.count == 0) return 0;
  return in_default_environment([&] { return rstd_of(moments, eps).hi; });
}

void update_running(std::span<double> running_mean, std::span<double> running_var, std::span<const Moments> batch,
                    double update_rate, int ddof) {
  const DefaultFloatingPoint environment;
  const Problem channels{1, static_cast<std::int64_t>(batch.size()), 1};
  check::channels("running_mean", running_mean.size(), channels);
  check::channels("running_var", running_var.size(), channels);
  check::apart({{"running_mean", running_mean}, {"running_var", running_var}}, {{"batch", batch}});
  check::counts("batch", batch);
  check::update_rate(update_rate);
  check::ddof(ddof);
  check::counts_above("batch", batch, ddof);
  const auto blend = [update_rate](double& running, double value) {
    // The ends are exact: (1 - 0)*running + 0*value would lose a running value to value = infinity.
    if (update_rate == 0) return;
    running = update_rate == 1 ? value : (1 - update_rate) * running + update_rate * value;
  };
  run_here([&] {
    for (std::size_t c = 0; c < batch.size(); ++c) {
      if (batch[c].count == 0) continue;
      blend(running_mean[c], batch[c].mean);
      blend(running_var[c], variance_of(batch[c], ddof).hi);
    }
  });
}

template <class T>
void batch_norm(std::span<const T> x, const Call<T>& call, std::span<T> y, std::span<Moments> saved,
                const Options& options) {
  const DefaultFloatingPoint environment;
  CheckedCall<T> checked(call, options);
  check::size("x", x.size(), call.problem);
  check_output(checked, call, x, y);
  checked.check_entries("saved", saved.size());
  checked.check_batch();
  check::apart({{"saved", saved}}, {{"x", x}, {"y", y}, {"residual", call.tail.residual}});
  checked.check_apart({{"saved", saved}});
  checked.follow(y.data());
  checked.run(
      [&](const Part<T>& part, std::int64_t at, std::int64_t entry, int threads, const PartOf& of) {
        run_batch_norm(x.data() + at, part, y.data() + at, saved.data() + entry, threads, of);
      },
      [&] {
        std::fill(saved.begin(), saved.end(), Moments{});
        write_head(checked.whole());
      });
}

template <class T>
void normalize(std::span<const T> x, const Call<T>& call, ChannelValues mean, ChannelValues var, std::span<T> y,
               const Options& options) {
  const DefaultFloatingPoint environment;
  CheckedCall<T> checked(call, options);
  check::size("x", x.size(), call.problem);
  check_one_group(call);
  check_given(mean, var, call.problem);
  check_output(checked, call, x, y);
  check::apart({{"y", y}}, {{"mean", mean}, {"var", var}});
  if (!call.tail.bits.empty()) check::apart({{"bits", call.tail.bits}}, {{"mean", mean}, {"var", var}});
  checked.follow(y.data());
  run_normalize(x.data(), checked.whole(), {mean, var}, y.data(), options.threads);
}

template <class T>
void normalize(std::span<const T> x, const Call<T>& call, std::span<const Moments> moments, std::span<T> y,
               const Options& options) {
  const DefaultFloatingPoint environment;
  CheckedCall<T> checked(call, options);
  check::size("x", x.size(), call.problem);
  checked.check_entries("moments", moments.size());
  check::counts("moments", moments);
  check_output(checked, call, x, y);
  check::apart({{"y", y}}, {{"moments", moments}});
  if (!call.tail.bits.empty()) check::apart({{"bits", call.tail.bits}}, {{"moments", moments}});
  checked.follow(y.data());
  checked.run(
      [&](const Part<T>& part, std::int64_t at, std::int64_t entry, int threads, const PartOf& of) {
        run_normalize(x.data() + at, part, {{}, {}, moments.data() + entry}, y.data() + at, threads, of);
      },
      [&] { write_head(checked.whole()); });
}

template <class T>
void grad_sums(std::span<const T> dy, std::span<const T> x, const Call<T>& call, std::span<const Moments> moments,
               std::span<GradSums> out, const Options& options) {
  const DefaultFloatingPoint environment;
  CheckedCall<T> checked(call, options);
  check_inputs(call, dy, x);
  checked.check_entries("moments", moments.size());
  check::counts("moments", moments);
  checked.check_entries("out", out.size());
  check::apart({{"out", out}}, {{"dy", dy}, {"x", x}, {"moments", moments}});
  checked.check_apart({{"out", out}});
  checked.let_through();
  checked.run(
      [&](const Part<T>& part, std::int64_t at, std::int64_t entry, int threads, const PartOf& of) {
        run_grad_sums(dy.data() + at, x.data() + at, part, moments.data() + entry, out.data() + entry, threads, of);
      },
      [&] { std::fill(out.begin(), out.end(), GradSums{}); });
}

template <class T>
void grad_input(std::span<const T> dy, std::span<const T> x, const Call<T>& call, std::span<const Moments> moments,
                std::span<const GradSums> sums, std::span<T> dx, std::span<T> dresidual, const Options& options) {
  const DefaultFloatingPoint environment;
  CheckedCall<T> checked(call, options);
  check_inputs(call, dy, x);
  checked.check_counts("moments", moments);
  checked.check_entries("sums", sums.size());
  check::size("dx", dx.size(), call.problem);
  const Gradients<T> out{dx, dresidual};
  check_gradients(checked, call, dy, x, out);
  check::apart({{"dx", dx}, {"dresidual", dresidual}}, {{"moments", moments}, {"sums", sums}});
  checked.let_through();
  checked.run([&](const Part<T>& part, std::int64_t at, std::int64_t entry, int threads, const PartOf& of) {
    run_grad_input(dy.data() + at, x.data() + at, part, moments.data() + entry, sums.data() + entry, outputs(out, at),
                   threads, of);
  });
}

template <class T>
void batch_norm_backward(std::span<const T> dy, std::span<const T> x, const Call<T>& call,
                         std::span<const Moments> saved, const Gradients<T>& out, const Options& options) {
  const DefaultFloatingPoint environment;
  CheckedCall<T> checked(call, options);
  check_inputs(call, dy, x);
  checked.check_counts("saved", saved);
  check_gradients(checked, call, dy, x, out);
  check::apart({{"dx", out.dx}, {"dresidual", out.dresidual}, {"dgamma", out.dgamma}, {"dbeta", out.dbeta}},
               {{"saved", saved}});
  checked.let_through();
  // Of segments dgamma and dbeta are sums, where those of each are not wanted.
  const auto channels = static_cast<std::size_t>(call.problem.channels);
  const auto sums = [&](const ChannelOutput& to) { return to.wanted() && to.size() < saved.size(); };
  std::vector<double> of_gamma(sums(out.dgamma) ? saved.size() : 0), of_beta(sums(out.dbeta) ? saved.size() : 0);
  const auto run_part = [&](const Part<T>& part, std::int64_t at, std::int64_t entry, int threads, const PartOf& of) {
    FirstOutputs<T> to = outputs(out, at);
    const auto of_part = [&](std::vector<double>& all, const ChannelOutput& wanted) {
      if (all.empty()) return checked.part_of(wanted, entry);
      return ChannelOutput(std::span<double>(all).subspan(static_cast<std::size_t>(entry), channels));
    };
    to.dgamma = of_part(of_gamma, out.dgamma);
    to.dbeta = of_part(of_beta, out.dbeta);
    run_batch_norm_backward(dy.data() + at, x.data() + at, part, saved.data() + entry, to, threads, of);
  };
  // Of segments without rows.
  const auto clear = [&] {
    for (const ChannelOutput& each : {out.dgamma, out.dbeta}) {
      for (std::size_t e = 0; !sums(each) && e < each.size(); ++e) each.set(static_cast<std::int64_t>(e), 0);
    }
  };
  checked.run(run_part, clear);
  if (!of_gamma.empty()) SumsOverSegments(of_gamma, call.problem.channels, out.dgamma).run(options.threads);
  if (!of_beta.empty()) SumsOverSegments(of_beta, call.problem.channels, out.dbeta).run(options.threads);
}

template <class T>
void normalize_backward(std::span<const T> dy, std::span<const T> x, const Call<T>& call, ChannelValues mean,
                        ChannelValues var, const Gradients<T>& out, const Options& options) {
  const DefaultFloatingPoint environment;
  CheckedCall<T> checked(call, options);
  check_inputs(call, dy, x);
  check_one_group(call);
  check_given(mean, var, call.problem);
  check_gradients(checked, call, dy, x, out);
  check::apart({{"dx", out.dx}, {"dresidual", out.dresidual}, {"dgamma", out.dgamma}, {"dbeta", out.dbeta}},
               {{"mean", mean}, {"var", var}});
  checked.let_through();
  run_normalize_backward(dy.data(), x.data(), checked.whole(), {mean, var}, outputs(out, 0), options.threads);
}

template <class T>
void batch_norm_jvp(std::span<const T> x_dot, std::span<const T> x, const Call<T>& call, std::span<const Moments> saved,
                    ChannelValues gamma_dot, ChannelValues beta_dot, std::span<T> y_dot, const Options& options) {
  const DefaultFloatingPoint environment;
  const Tangents tangents{gamma_dot, beta_dot, {}, {}};
  CheckedCall<T> checked(call, options);
  checked.check_counts("saved", saved);
  check_jvp(checked, call, x_dot, x, tangents, y_dot);
  check::apart({{"y_dot", y_dot}}, {{"saved", saved}});
  checked.follow_along();
  checked.run([&](const Part<T>& part, std::int64_t at, std::int64_t entry, int threads, const PartOf& of) {
    const Tangents along{checked.part_of(gamma_dot, entry), checked.part_of(beta_dot, entry), {}, {}};
    run_batch_norm_jvp<T>(x_dot.data() + at, x.data() + at, part, saved.data() + entry, nullptr, along,
                          y_dot.data() + at, threads, of);
  });
}

template <class T>
void normalize_jvp(std::span<const T> x_dot, std::span<const T> x, const Call<T>& call, ChannelValues mean,
                   ChannelValues var, ChannelValues mean_dot, ChannelValues var_dot, ChannelValues gamma_dot,
                   ChannelValues beta_dot, std::span<T> y_dot, const Options& options) {
  const DefaultFloatingPoint environment;
  const Tangents tangents{gamma_dot, beta_dot, mean_dot, var_dot};
  CheckedCall<T> checked(call, options);
  check_one_group(call);
  check_given(mean, var, call.problem);
  check_jvp(checked, call, x_dot, x, tangents, y_dot);
  check::apart({{"y_dot", y_dot}}, {{"mean", mean}, {"var", var}});
  checked.follow_along();
  run_normalize_jvp<T>(x_dot.data(), x.data(), checked.whole(), {mean, var}, tangents, y_dot.data(), options.threads);
}

template <class T>
void batch_norm_double_backward(std::span<const T> v, std::span<const T> dy, std::span<const T> x, const Call<T>& call,
                                std::span<const Moments> saved, ChannelValues v_dgamma, ChannelValues v_dbeta,
                                std::span<T> ddy, std::span<T> dx, ChannelOutput dgamma, const Options& options) {
  const DefaultFloatingPoint environment;
  const Cotangents w{v_dgamma, v_dbeta};
  const CheckedCall<T> checked(call, options);
  checked.check_counts("saved", saved);
  check_double_backward(checked, call, v, dy, x, w, ddy, dx, dgamma);
  for (const check::Memory& output : {check::Memory{"ddy", ddy}, {"dx", dx}, {"dgamma", dgamma}}) {
    check::apart({output}, {{"saved", saved}});
  }
  run_batch_norm_double_backward<T>(v.data(), dy.data(), x.data(), checked.whole(), saved.data(), w,
                                    {data_or_null(ddy), data_or_null(dx), dgamma}, options.threads);
}

template <class T>
void normalize_double_backward(std::span<const T> v, std::span<const T> dy, std::span<const T> x, const Call<T>& call,
                               ChannelValues mean, ChannelValues var, ChannelValues v_dgamma, ChannelValues v_dbeta,
                               std::span<T> ddy, std::span<T> dx, ChannelOutput dgamma, const Options& options) {
  const DefaultFloatingPoint environment;
  const Cotangents w{v_dgamma, v_dbeta};
  const CheckedCall<T> checked(call, options);
  check_given(mean, var, call.problem);
  check_double_backward(checked, call, v, dy, x, w, ddy, dx, dgamma);
  for (const check::Memory& output : {check::Memory{"ddy", ddy}, {"dx", dx}, {"dgamma", dgamma}}) {
    check::apart({output}, {{"mean", mean}, {"var", var}});
  }
  run_normalize_double_backward<T>(v.data(), dy.data(), x.data(), checked.whole(), {mean, var}, w,
                                   {data_or_null(ddy), data_or_null(dx), dgamma}, options.threads);
}

#define BN_INSTANTIATE(T)                                                                                              \
  template void moments(std::span<const T>, const Call<T>&, std::span<Moments>, const Options&);                       \
  template void batch_norm(std::span<const T>, const Call<T>&, std::span<T>, std::span<Moments>, const Options&);      \
  template void normalize(std::span<const T>, const Call<T>&, ChannelValues, ChannelValues, std::span<T>,              \
                          const Options&);                                                                             \
  template void normalize(std::span<const T>, const Call<T>&, std::span<const Moments>, std::span<T>, const Options&); \
  template void grad_sums(std::span<const T>, std::span<const T>, const Call<T>&, std::span<const Moments>,            \
                          std::span<GradSums>, const Options&);                                                        \
  template void grad_input(std::span<const T>, std::span<const T>, const Call<T>&, std::span<const Moments>,           \
                           std::span<const GradSums>, std::span<T>, std::span<T>, const Options&);                     \
  template void batch_norm_backward(std::span<const T>, std::span<const T>, const Call<T>&, std::span<const Moments>,  \
                                    const Gradients<T>&, const Options&);                                              \
  template void normalize_backward(std::span<const T>, std::span<const T>, const Call<T>&, ChannelValues,              \
                                   ChannelValues, const Gradients<T>&, const Options&);                                \
  template void batch_norm_jvp(std::span<const T>, std::span<const T>, const Call<T>&, std::span<const Moments>,       \
                               ChannelValues, ChannelValues, std::span<T>, const Options&);                            \
  template void normalize_jvp(std::span<const T>, std::span<const T>, const Call<T>&, ChannelValues, ChannelValues,    \
                              ChannelValues, ChannelValues, ChannelValues, ChannelValues, std::span<T>,                \
                              const Options&);                                                                         \
  template void batch_norm_double_backward(std::span<const T>, std::span<const T>, std::span<const T>, const Call<T>&, \
                                           std::span<const Moments>, ChannelValues, ChannelValues, std::span<T>,       \
                                           std::span<T>, ChannelOutput, const Options&);                               \
  template void normalize_double_backward(std::span<const T>, std::span<const T>, std::span<const T>, const Call<T>&,  \
                                          ChannelValues, ChannelValues, ChannelValues, ChannelValues, std::span<T>,    \
                                          std::span<T>, ChannelOutput, const Options&);
BN_INSTANTIATE(Float16)
BN_INSTANTIATE(BFloat16)
BN_INSTANTIATE(float)
BN_INSTANTIATE(double)
#undef BN_INSTANTIATE

}  // namespace batchnorm
