#include "measure.hpp"

#include <algorithm>

#include "load.hpp"

namespace bench {
namespace {

// One way to move the bytes. The fastest of a kind is the yardstick: a small tensor is best copied by one thread
// through the caches, a large one around them, and where the limits lie is not for the benchmark to guess.
struct Form {
  Yardstick kind;
  const char* name;
  int threads;
  Stores stores;
  Samples seconds = {};
};

std::vector<Form> forms_of(const std::vector<PassFacts>& passes, int threads, double megabytes) {
  constexpr double kOneThreadUpTo = 16;  // MB a tensor; above, no machine is fastest with one of several threads
  std::vector<Form> forms;
  for (const Yardstick kind : {Yardstick::copy, Yardstick::stream}) {
    if (std::none_of(passes.begin(), passes.end(), [&](const auto& p) { return p.yardstick == kind; })) continue;
    forms.push_back({kind, "ordinary stores", threads, Stores::ordinary});
    forms.push_back({kind, "stores around the caches", threads, Stores::around_caches});
    if (threads > 1 && megabytes <= kOneThreadUpTo) forms.push_back({kind, "one thread", 1, Stores::ordinary});
  }
  return forms;
}

const Form& best_of(const std::vector<Form>& forms, Yardstick kind) {
  return *std::min_element(forms.begin(), forms.end(), [&](const Form& a, const Form& b) {
    if ((a.kind == kind) != (b.kind == kind)) return a.kind == kind;
    return spread_of(a.seconds).median < spread_of(b.seconds).median;
  });
}

const char* name_of(Yardstick kind) { return kind == Yardstick::copy ? "copy" : "stream"; }

// Of each round: what disturbs a pass for longer than its turn disturbs its yardstick as well.
Spread ratio_of(const Samples& seconds, const Samples& yardstick) {
  Samples ratios(seconds.size());
  std::transform(seconds.begin(), seconds.end(), yardstick.begin(), ratios.begin(), std::divides<>());
  return spread_of(std::move(ratios));
}

Row row_of(const char* pass, double bytes, const Samples& seconds, const Form& best) {
  return {pass,
          bytes,
          spread_of(seconds),
          ratio_of(seconds, best.seconds),
          std::string(name_of(best.kind)) + ", " + best.name,
          spread_of(best.seconds).median};
}

}  // namespace

template <class T>
Measured measure(const Case& shape, Layout layout, const Request& request, Team& team) {
  Tensors<T> tensors(problem_of(shape.shape, layout), shape.shape[0], request.threads, request.out);
  for (const PassFacts& p : request.passes) tensors.verify(p.pass, request.spoil == p.name);

  auto forms = forms_of(request.passes, request.threads, tensors.megabytes());
  std::vector<std::function<void()>> works;
  for (const Form& form : forms) {
    tensors.verify(form.kind, team, form.threads, form.stores);
    works.push_back([&] { tensors.move(form.kind, team, form.threads, form.stores); });
  }
  for (const PassFacts& p : request.passes) works.push_back([&] { tensors.run(p.pass); });

  Measured measured{{}, false, 0};
  const OthersLoad load;
  const auto samples = time_in_turns(works, request.rounds, measured.disturbed);
  measured.others = load.processors();
  for (std::size_t f = 0; f < forms.size(); ++f) forms[f].seconds = samples[f];

  const double bytes = tensors.megabytes() * 1e6;
  for (const Yardstick kind : {Yardstick::copy, Yardstick::stream}) {
    const Form& best = best_of(forms, kind);
    const int streams = kind == Yardstick::copy ? 2 : 3;
    if (best.kind == kind) measured.rows.push_back(row_of(name_of(kind), streams * bytes, best.seconds, best));
  }
  for (std::size_t p = 0; p < request.passes.size(); ++p) {
    const PassFacts& facts = request.passes[p];
    const Form& best = best_of(forms, facts.yardstick);
    measured.rows.push_back(row_of(facts.name, facts.tensors * bytes, samples[forms.size() + p], best));
  }
  return measured;
}

template Measured measure<batchnorm::Float16>(const Case&, Layout, const Request&, Team&);
template Measured measure<batchnorm::BFloat16>(const Case&, Layout, const Request&, Team&);
template Measured measure<float>(const Case&, Layout, const Request&, Team&);
template Measured measure<double>(const Case&, Layout, const Request&, Team&);

}  // namespace bench
