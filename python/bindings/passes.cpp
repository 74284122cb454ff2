// The passes, each as one function of a call. As module.cpp: views in, GIL released, core called. Compiled once for
// _core and once for _cuda (site.hpp).
//
// A call comes as a tuple (sizes, offsets, width, weights, padding, gamma, beta, eps, residual, relu, bits,
// each_position, about_zero, alpha, strided); what is absent is None.
#include <pybind11/stl.h>

#include <optional>

#include "calls.hpp"
#include "site.hpp"

namespace batchnorm::bindings {
namespace {

using MaybeArray = std::optional<py::array>;

template <class T>
std::span<const T> tensor_or_none(const py::object& a, const char* name) {
  return a.is_none() ? std::span<const T>{} : tensor<T>(checked_array(a, name), name);
}
template <class T>
std::span<T> output_or_none(MaybeArray& a, const char* name) {
  return a ? output<T>(*a, name) : std::span<T>{};
}

// Contiguous values of one dimension that Python has made.
template <class T>
std::span<const T> plain_values(const py::object& a, const char* name) {
  if (a.is_none()) return {};
  const auto array = checked_array(a, name);
  // An unpickled array has a dtype of its own, which is equal.
  const py::dtype wanted = py::dtype::of<T>();
  if (!wanted.equal(array.dtype()) || (array.flags() & py::array::c_style) == 0) {
    throw py::type_error(std::string(name) + " must be a contiguous array of " + py::str(wanted).cast<std::string>());
  }
  return {static_cast<const T*>(array.data()), static_cast<std::size_t>(array.size())};
}

// What a call is made of, as Python gave it; as<T>() is it for tensors of T. It lives as long as the tuple does.
class GivenCall {
 public:
  explicit GivenCall(const py::tuple& call) : call_(call) {
    if (call.size() != 15) throw py::value_error("a call must have 15 entries");
    const auto sizes = call[0].cast<Sizes>();
    problem_ = problem_of(sizes);
    offsets_ = plain_values<std::int64_t>(call[1], "offsets");
    width_ = call[2].cast<std::int64_t>();
    gamma_ = channel_values(call[5], "gamma");
    beta_ = channel_values(call[6], "beta");
    eps_ = call[7].cast<double>();
    const int padding = call[4].cast<int>();
    if (padding < 0 || padding > 2) throw py::value_error("padding must be 0 (zero), 1 (keep) or 2 (normalize)");
    padding_ = static_cast<Padding>(padding);
    relu_ = call[9].cast<bool>();
    each_position_ = call[11].cast<bool>();
    about_ = call[12].cast<bool>() ? About::zero : About::mean;
    alpha_ = channel_values(call[13], "alpha");
    strided_ = call[14].cast<bool>();
    const auto bits = plain_values<std::uint8_t>(call[10], "bits");
    // Made for the call by Python, which may not write to them itself.
    bits_ = {const_cast<std::uint8_t*>(bits.data()), bits.size()};
  }

  template <class T>
  [[nodiscard]] Call<T> as() const {
    using W = typename detail::WeightType<T>::type;
    return {.problem = problem_,
            .groups = {offsets_, width_, each_position_, about_, alpha_, strided_},
            .counted = {plain_values<W>(call_[3], "weights"), padding_},
            .gamma = gamma_,
            .beta = beta_,
            .eps = eps_,
            .tail = {tensor_or_none<T>(call_[8], "residual"), relu_, bits_}};
  }

 private:
  py::tuple call_;
  Problem problem_;
  std::span<const std::int64_t> offsets_;
  std::int64_t width_;
  ChannelValues gamma_, beta_;
  double eps_;
  Padding padding_;
  bool relu_, each_position_, strided_;
  About about_;
  ChannelValues alpha_;
  std::span<std::uint8_t> bits_;
};

// The statistics that normalize: the table of a batch's moments, or the tuple (mean, var) of those that were given.
class Statistics {
 public:
  explicit Statistics(const py::object& given) {
    if (!py::isinstance<py::tuple>(given)) {
      moments_ = table<Moments>(checked_array(given, "moments"), "moments");
      return;
    }
    const auto pair = py::reinterpret_borrow<py::tuple>(given);
    if (pair.size() != 2) throw py::value_error("statistics must be moments or (mean, var)");
    mean_ = channel_values(pair[0], "mean");
    var_ = channel_values(pair[1], "var");
    are_given_ = true;
  }

  // by_moments(moments) or by_given(mean, var)
  template <class ByMoments, class ByGiven>
  void visit(const ByMoments& by_moments, const ByGiven& by_given) const {
    are_given_ ? by_given(mean_, var_) : by_moments(moments_);
  }

 private:
  bool are_given_ = false;
  std::span<const Moments> moments_;
  ChannelValues mean_, var_;
};

void py_moments(const py::array& x, const py::tuple& call, py::array out, const Where& where) {
  const GivenCall given(call);
  with_dtype_of(x, [&]<class T>(T) {
    const auto in = tensor<T>(x, "x");
    const Call<T> of = given.as<T>();
    const auto to = rows<Moments>(out, "moments");
    const ReleaseForWork gil(x.size());
    const Site at(where);
    site::moments<T>(in, of, to, at.options());
  });
}

void py_batch_norm(const py::array& x, const py::tuple& call, py::array y, py::array saved, const Where& where) {
  const GivenCall given(call);
  with_dtype_of(x, [&]<class T>(T) {
    const auto in = tensor<T>(x, "x");
    const Call<T> of = given.as<T>();
    const auto out = output<T>(y, "out");
    const auto to = rows<Moments>(saved, "moments");
    const ReleaseForWork gil(x.size());
    const Site at(where);
    site::batch_norm<T>(in, of, out, to, at.options());
  });
}

void py_normalize(const py::array& x, const py::tuple& call, const py::object& statistics, py::array y,
                  const Where& where) {
  const GivenCall given(call);
  const Statistics by(statistics);
  with_dtype_of(x, [&]<class T>(T) {
    const auto in = tensor<T>(x, "x");
    const Call<T> of = given.as<T>();
    const auto out = output<T>(y, "out");
    const ReleaseForWork gil(x.size());
    const Site at(where);
    by.visit([&](auto moments) { site::normalize<T>(in, of, moments, out, at.options()); },
             [&](auto mean, auto var) { site::normalize<T>(in, of, mean, var, out, at.options()); });
  });
}

void py_grad_sums(const py::array& dy, const py::array& x, const py::tuple& call, const py::array& saved, py::array out,
                  const Where& where) {
  const GivenCall given(call);
  const auto stats = table<Moments>(saved, "moments");
  with_dtype_of(x, [&]<class T>(T) {
    const auto g = tensor<T>(dy, "dy");
    const auto in = tensor<T>(x, "x");
    const Call<T> of = given.as<T>();
    const auto to = rows<GradSums>(out, "sums");
    const ReleaseForWork gil(x.size());
    const Site at(where);
    site::grad_sums<T>(g, in, of, stats, to, at.options());
  });
}

void py_grad_input(const py::array& dy, const py::array& x, const py::tuple& call, const py::array& saved,
                   const py::array& sums, py::array dx, MaybeArray dresidual, const Where& where) {
  const GivenCall given(call);
  const auto stats = table<Moments>(saved, "moments");
  const auto of_sums = table<GradSums>(sums, "sums");
  with_dtype_of(x, [&]<class T>(T) {
    const auto g = tensor<T>(dy, "dy");
    const auto in = tensor<T>(x, "x");
    const Call<T> of = given.as<T>();
    const auto out = output<T>(dx, "out"), passed_on = output_or_none<T>(dresidual, "out");
    const ReleaseForWork gil(x.size());
    const Site at(where);
    site::grad_input<T>(g, in, of, stats, of_sums, out, passed_on, at.options());
  });
}

void py_backward(const py::array& dy, const py::array& x, const py::tuple& call, const py::object& statistics,
                 MaybeArray dx, MaybeArray dresidual, MaybeArray dgamma, MaybeArray dbeta, const Where& where) {
  const GivenCall given(call);
  const Statistics by(statistics);
  const GradientInto to_gamma(dgamma, "dgamma"), to_beta(dbeta, "dbeta");
  with_dtype_of(x, [&]<class T>(T) {
    const auto g = tensor<T>(dy, "dy");
    const auto in = tensor<T>(x, "x");
    const Call<T> of = given.as<T>();
    const Gradients<T> out{output_or_none<T>(dx, "out"), output_or_none<T>(dresidual, "out"), to_gamma.output(),
                           to_beta.output()};
    const ReleaseForWork gil(x.size());
    const Site at(where);
    by.visit([&](auto moments) { site::batch_norm_backward<T>(g, in, of, moments, out, at.options()); },
             [&](auto mean, auto var) { site::normalize_backward<T>(g, in, of, mean, var, out, at.options()); });
  });
  to_gamma.deliver();
  to_beta.deliver();
}

#if !defined(BATCHNORM_ON_DEVICE)  // which has no derivatives of second order, and none along tangents
// mean_dot and var_dot are None where the statistics are moments, which follow x.
void py_jvp(const py::array& x_dot, const py::array& x, const py::tuple& call, const py::object& statistics,
            const py::object& mean_dot, const py::object& var_dot, const py::object& gamma_dot,
            const py::object& beta_dot, py::array y_dot, const Where& where) {
  const GivenCall given(call);
  const Statistics by(statistics);
  const ChannelValues m = channel_values(mean_dot, "mean_dot"), v = channel_values(var_dot, "var_dot");
  const ChannelValues g = channel_values(gamma_dot, "gamma_dot"), b = channel_values(beta_dot, "beta_dot");
  with_dtype_of(x, [&]<class T>(T) {
    const auto tangent = tensor<T>(x_dot, "x_dot");
    const auto in = tensor<T>(x, "x");
    const Call<T> of = given.as<T>();
    const auto out = output<T>(y_dot, "out");
    const ReleaseForWork gil(x.size());
    const Site at(where);
    by.visit([&](auto moments) { site::batch_norm_jvp<T>(tangent, in, of, moments, g, b, out, at.options()); },
             [&](auto mean, auto var) {
               site::normalize_jvp<T>(tangent, in, of, mean, var, m, v, g, b, out, at.options());
             });
  });
}

void py_double_backward(const py::array& v, const py::array& dy, const py::array& x, const py::tuple& call,
                        const py::object& statistics, const py::object& v_dgamma, const py::object& v_dbeta,
                        MaybeArray ddy, MaybeArray dx, MaybeArray dgamma, const Where& where) {
  const GivenCall given(call);
  const Statistics by(statistics);
  const ChannelValues w = channel_values(v_dgamma, "v_dgamma"), b = channel_values(v_dbeta, "v_dbeta");
  const GradientInto to_gamma(dgamma, "dgamma");
  with_dtype_of(x, [&]<class T>(T) {
    const auto of_dx = tensor<T>(v, "v_dx"), g = tensor<T>(dy, "dy"), in = tensor<T>(x, "x");
    const Call<T> of = given.as<T>();
    const auto to_dy = output_or_none<T>(ddy, "out"), to_x = output_or_none<T>(dx, "out");
    const ChannelOutput dg = to_gamma.output();
    const ReleaseForWork gil(x.size());
    const Site at(where);
    by.visit(
        [&](auto moments) {
          site::batch_norm_double_backward<T>(of_dx, g, in, of, moments, w, b, to_dy, to_x, dg, at.options());
        },
        [&](auto mean, auto var) {
          site::normalize_double_backward<T>(of_dx, g, in, of, mean, var, w, b, to_dy, to_x, dg, at.options());
        });
  });
  to_gamma.deliver();
}

#endif

}  // namespace

void add_passes(py::module_& m) {
  using py::arg;
  const auto def = [&m](const char* name, auto* f, const char* text, auto... args) { m.def(name, f, args..., text); };
  m.def(
      "relu_mask_bytes", [](const Sizes& sizes) { return relu_mask_bytes(problem_of(sizes)); }, arg("sizes"),
      "Bytes of the bits of a ReLU.");
  def("moments", &py_moments, "Moments of each set and channel, into out.", arg("x"), arg("call"), arg("out"),
      arg("where"));
  def("batch_norm", &py_batch_norm, "Training forward into out and moments.", arg("x"), arg("call"), arg("out"),
      arg("moments"), arg("where"));
  def("normalize", &py_normalize, "Inference forward, or the second half of training forward, into out.", arg("x"),
      arg("call"), arg("statistics"), arg("out"), arg("where"));
  def("grad_sums", &py_grad_sums, "First half of the backward pass, into out.", arg("dy"), arg("x"), arg("call"),
      arg("moments"), arg("out"), arg("where"));
  def("grad_input", &py_grad_input, "Second half of the backward pass, into out.", arg("dy"), arg("x"), arg("call"),
      arg("moments"), arg("sums"), arg("out"), arg("dresidual"), arg("where"));
  def("backward", &py_backward, "Gradients of batch_norm and normalize.", arg("dy"), arg("x"), arg("call"),
      arg("statistics"), arg("out"), arg("dresidual"), arg("dgamma"), arg("dbeta"), arg("where"));
#if !defined(BATCHNORM_ON_DEVICE)
  def("jvp", &py_jvp, "Derivative of batch_norm and normalize along tangents, into out.", arg("x_dot"), arg("x"),
      arg("call"), arg("statistics"), arg("mean_dot"), arg("var_dot"), arg("gamma_dot"), arg("beta_dot"), arg("out"),
      arg("where"));
  def("double_backward", &py_double_backward, "Gradients of backward, of one set.", arg("v_dx"), arg("dy"), arg("x"),
      arg("call"), arg("statistics"), arg("v_dgamma"), arg("v_dbeta"), arg("ddy"), arg("dx"), arg("dgamma"),
      arg("where"));
#endif
}

}  // namespace batchnorm::bindings
