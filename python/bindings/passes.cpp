// The passes, each as one function of a call. As module.cpp: views in, GIL released, core called.
//
// A call comes as a tuple (sizes, offsets, weights, padding, gamma, beta, eps, residual, relu, bits); what is absent is
// None.
#include <pybind11/stl.h>

#include <optional>

#include "batchnorm/batchnorm.hpp"
#include "calls.hpp"

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
  if (!py::dtype::of<T>().is(array.dtype()) || (array.flags() & py::array::c_style) == 0) {
    throw py::type_error(std::string(name) + " must be a contiguous array of its dtype");
  }
  return {static_cast<const T*>(array.data()), static_cast<std::size_t>(array.size())};
}

// What a call is made of, as Python gave it; as<T>() is it for tensors of T. It lives as long as the tuple does.
class GivenCall {
 public:
  explicit GivenCall(const py::tuple& call) : call_(call) {
    if (call.size() != 10) throw py::value_error("a call must have 10 entries");
    const auto sizes = call[0].cast<Sizes>();
    problem_ = problem_of(sizes);
    offsets_ = plain_values<std::int64_t>(call[1], "offsets");
    gamma_ = channel_values(call[4], "gamma");
    beta_ = channel_values(call[5], "beta");
    eps_ = call[6].cast<double>();
    const int padding = call[3].cast<int>();
    if (padding < 0 || padding > 2) throw py::value_error("padding must be 0 (zero), 1 (keep) or 2 (normalize)");
    padding_ = static_cast<Padding>(padding);
    relu_ = call[8].cast<bool>();
    const auto bits = plain_values<std::uint8_t>(call[9], "bits");
    // Made for the call by Python, which may not write to them itself.
    bits_ = {const_cast<std::uint8_t*>(bits.data()), bits.size()};
  }

  template <class T>
  [[nodiscard]] Call<T> as() const {
    using W = typename detail::WeightType<T>::type;
    return {.problem = problem_,
            .groups = {offsets_},
            .counted = {plain_values<W>(call_[2], "weights"), padding_},
            .gamma = gamma_,
            .beta = beta_,
            .eps = eps_,
            .tail = {tensor_or_none<T>(call_[7], "residual"), relu_, bits_}};
  }

 private:
  py::tuple call_;
  Problem problem_;
  std::span<const std::int64_t> offsets_;
  ChannelValues gamma_, beta_;
  double eps_;
  Padding padding_;
  bool relu_;
  std::span<std::uint8_t> bits_;
};

void py_moments(const py::array& x, const py::tuple& call, py::array out, int threads) {
  const GivenCall given(call);
  with_dtype_of(x, [&]<class T>(T) {
    const auto in = tensor<T>(x, "x");
    const Call<T> of = given.as<T>();
    const auto to = rows<Moments>(out, "moments");
    const ReleaseForWork gil(x.size());
    moments<T>(in, of, to, {threads});
  });
}

void py_batch_norm(const py::array& x, const py::tuple& call, py::array y, py::array saved, int threads) {
  const GivenCall given(call);
  with_dtype_of(x, [&]<class T>(T) {
    const auto in = tensor<T>(x, "x");
    const Call<T> of = given.as<T>();
    const auto out = output<T>(y, "out");
    const auto to = rows<Moments>(saved, "moments");
    const ReleaseForWork gil(x.size());
    batch_norm<T>(in, of, out, to, {threads});
  });
}

void py_normalize(const py::array& x, const py::tuple& call, const py::object& mean, const py::object& var, py::array y,
                  int threads) {
  const GivenCall given(call);
  const ChannelValues m = channel_values(mean, "mean"), v = channel_values(var, "var");
  with_dtype_of(x, [&]<class T>(T) {
    const auto in = tensor<T>(x, "x");
    const Call<T> of = given.as<T>();
    const auto out = output<T>(y, "out");
    const ReleaseForWork gil(x.size());
    normalize<T>(in, of, m, v, out, {threads});
  });
}

void py_normalize_by_moments(const py::array& x, const py::tuple& call, const py::array& saved, py::array y,
                             int threads) {
  const GivenCall given(call);
  const auto stats = table<Moments>(saved, "moments");
  with_dtype_of(x, [&]<class T>(T) {
    const auto in = tensor<T>(x, "x");
    const Call<T> of = given.as<T>();
    const auto out = output<T>(y, "out");
    const ReleaseForWork gil(x.size());
    normalize<T>(in, of, stats, out, {threads});
  });
}

void py_grad_sums(const py::array& dy, const py::array& x, const py::tuple& call, const py::array& saved, py::array out,
                  int threads) {
  const GivenCall given(call);
  const auto stats = table<Moments>(saved, "moments");
  with_dtype_of(x, [&]<class T>(T) {
    const auto g = tensor<T>(dy, "dy");
    const auto in = tensor<T>(x, "x");
    const Call<T> of = given.as<T>();
    const auto to = rows<GradSums>(out, "sums");
    const ReleaseForWork gil(x.size());
    grad_sums<T>(g, in, of, stats, to, {threads});
  });
}

void py_grad_input(const py::array& dy, const py::array& x, const py::tuple& call, const py::array& saved,
                   const py::array& sums, py::array dx, MaybeArray dresidual, int threads) {
  const GivenCall given(call);
  const auto stats = table<Moments>(saved, "moments");
  const auto of_sums = table<GradSums>(sums, "sums");
  with_dtype_of(x, [&]<class T>(T) {
    const auto g = tensor<T>(dy, "dy");
    const auto in = tensor<T>(x, "x");
    const Call<T> of = given.as<T>();
    const auto out = output<T>(dx, "out"), passed_on = output_or_none<T>(dresidual, "out");
    const ReleaseForWork gil(x.size());
    grad_input<T>(g, in, of, stats, of_sums, out, passed_on, {threads});
  });
}

// f(dy, x, call, gradients)
template <class F>
void gradients_of(const py::array& dy, const py::array& x, const py::tuple& call, MaybeArray dx, MaybeArray dresidual,
                  MaybeArray dgamma, MaybeArray dbeta, const F& f) {
  const GivenCall given(call);
  const GradientInto to_gamma(dgamma, "dgamma"), to_beta(dbeta, "dbeta");
  with_dtype_of(x, [&]<class T>(T) {
    const auto g = tensor<T>(dy, "dy");
    const auto in = tensor<T>(x, "x");
    const Call<T> of = given.as<T>();
    const Gradients<T> out{output_or_none<T>(dx, "out"), output_or_none<T>(dresidual, "out"), to_gamma.output(),
                           to_beta.output()};
    const ReleaseForWork gil(x.size());
    f(g, in, of, out);
  });
  to_gamma.deliver();
  to_beta.deliver();
}

void py_backward(const py::array& dy, const py::array& x, const py::tuple& call, const py::array& saved, MaybeArray dx,
                 MaybeArray dresidual, MaybeArray dgamma, MaybeArray dbeta, int threads) {
  const auto stats = table<Moments>(saved, "moments");
  gradients_of(dy, x, call, std::move(dx), std::move(dresidual), std::move(dgamma), std::move(dbeta),
               [&]<class T>(std::span<const T> g, std::span<const T> in, const Call<T>& of, const Gradients<T>& out) {
                 batch_norm_backward<T>(g, in, of, stats, out, {threads});
               });
}

void py_normalize_backward(const py::array& dy, const py::array& x, const py::tuple& call, const py::object& mean,
                           const py::object& var, MaybeArray dx, MaybeArray dresidual, MaybeArray dgamma,
                           MaybeArray dbeta, int threads) {
  const ChannelValues m = channel_values(mean, "mean"), v = channel_values(var, "var");
  gradients_of(dy, x, call, std::move(dx), std::move(dresidual), std::move(dgamma), std::move(dbeta),
               [&]<class T>(std::span<const T> g, std::span<const T> in, const Call<T>& of, const Gradients<T>& out) {
                 normalize_backward<T>(g, in, of, m, v, out, {threads});
               });
}

void py_jvp(const py::array& x_dot, const py::array& x, const py::tuple& call, const py::array& saved,
            const py::object& gamma_dot, const py::object& beta_dot, py::array y_dot, int threads) {
  const GivenCall given(call);
  const auto stats = table<Moments>(saved, "moments");
  const ChannelValues g = channel_values(gamma_dot, "gamma_dot"), b = channel_values(beta_dot, "beta_dot");
  with_dtype_of(x, [&]<class T>(T) {
    const auto tangent = tensor<T>(x_dot, "x_dot");
    const auto in = tensor<T>(x, "x");
    const Call<T> of = given.as<T>();
    const auto out = output<T>(y_dot, "out");
    const ReleaseForWork gil(x.size());
    batch_norm_jvp<T>(tangent, in, of, stats, g, b, out, {threads});
  });
}

void py_normalize_jvp(const py::array& x_dot, const py::array& x, const py::tuple& call, const py::object& mean,
                      const py::object& var, const py::object& mean_dot, const py::object& var_dot,
                      const py::object& gamma_dot, const py::object& beta_dot, py::array y_dot, int threads) {
  const GivenCall given(call);
  const ChannelValues m = channel_values(mean, "mean"), v = channel_values(var, "var");
  const ChannelValues md = channel_values(mean_dot, "mean_dot"), vd = channel_values(var_dot, "var_dot");
  const ChannelValues g = channel_values(gamma_dot, "gamma_dot"), b = channel_values(beta_dot, "beta_dot");
  with_dtype_of(x, [&]<class T>(T) {
    const auto tangent = tensor<T>(x_dot, "x_dot");
    const auto in = tensor<T>(x, "x");
    const Call<T> of = given.as<T>();
    const auto out = output<T>(y_dot, "out");
    const ReleaseForWork gil(x.size());
    normalize_jvp<T>(tangent, in, of, m, v, md, vd, g, b, out, {threads});
  });
}

// f(v, dy, x, call, ddy, dx, dgamma), the outputs empty where None or not needed.
template <class F>
void second_gradients(const py::array& v, const py::array& dy, const py::array& x, const py::tuple& call,
                      MaybeArray ddy, MaybeArray dx, MaybeArray dgamma, const F& f) {
  const GivenCall given(call);
  const GradientInto to_gamma(dgamma, "dgamma");
  with_dtype_of(x, [&]<class T>(T) {
    const auto of_dx = tensor<T>(v, "v_dx");
    const auto g = tensor<T>(dy, "dy");
    const auto in = tensor<T>(x, "x");
    const Call<T> of = given.as<T>();
    const auto to_dy = output_or_none<T>(ddy, "out"), to_x = output_or_none<T>(dx, "out");
    const ReleaseForWork gil(x.size());
    f(of_dx, g, in, of, to_dy, to_x, to_gamma.output());
  });
  to_gamma.deliver();
}

void py_double_backward(const py::array& v, const py::array& dy, const py::array& x, const py::tuple& call,
                        const py::array& saved, const py::object& v_dgamma, const py::object& v_dbeta, MaybeArray ddy,
                        MaybeArray dx, MaybeArray dgamma, int threads) {
  const auto stats = table<Moments>(saved, "moments");
  const ChannelValues wg = channel_values(v_dgamma, "v_dgamma"), wb = channel_values(v_dbeta, "v_dbeta");
  second_gradients(v, dy, x, call, std::move(ddy), std::move(dx), std::move(dgamma),
                   [&]<class T>(std::span<const T> of_dx, std::span<const T> g, std::span<const T> in,
                                const Call<T>& of, std::span<T> to_dy, std::span<T> to_x, ChannelOutput to_gamma) {
                     batch_norm_double_backward<T>(of_dx, g, in, of, stats, wg, wb, to_dy, to_x, to_gamma, {threads});
                   });
}

void py_normalize_double_backward(const py::array& v, const py::array& dy, const py::array& x, const py::tuple& call,
                                  const py::object& mean, const py::object& var, const py::object& v_dgamma,
                                  const py::object& v_dbeta, MaybeArray ddy, MaybeArray dx, MaybeArray dgamma,
                                  int threads) {
  const ChannelValues m = channel_values(mean, "mean"), s = channel_values(var, "var");
  const ChannelValues wg = channel_values(v_dgamma, "v_dgamma"), wb = channel_values(v_dbeta, "v_dbeta");
  second_gradients(v, dy, x, call, std::move(ddy), std::move(dx), std::move(dgamma),
                   [&]<class T>(std::span<const T> of_dx, std::span<const T> g, std::span<const T> in,
                                const Call<T>& of, std::span<T> to_dy, std::span<T> to_x, ChannelOutput to_gamma) {
                     normalize_double_backward<T>(of_dx, g, in, of, m, s, wg, wb, to_dy, to_x, to_gamma, {threads});
                   });
}

}  // namespace

void add_passes(py::module_& m) {
  using py::arg;
  const auto def = [&m](const char* name, auto* f, const char* text, auto... args) { m.def(name, f, args..., text); };
  m.def(
      "relu_mask_bytes", [](const Sizes& sizes) { return relu_mask_bytes(problem_of(sizes)); }, arg("sizes"),
      "Bytes of the bits of a ReLU.");
  def("moments", &py_moments, "Moments of each set and channel, into out.", arg("x"), arg("call"), arg("out"),
      arg("threads"));
  def("batch_norm", &py_batch_norm, "Training forward into out and moments.", arg("x"), arg("call"), arg("out"),
      arg("moments"), arg("threads"));
  def("normalize", &py_normalize, "Inference forward into out.", arg("x"), arg("call"), arg("mean"), arg("var"),
      arg("out"), arg("threads"));
  def("normalize_by_moments", &py_normalize_by_moments, "Second half of training forward, into out.", arg("x"),
      arg("call"), arg("moments"), arg("out"), arg("threads"));
  def("grad_sums", &py_grad_sums, "First half of the backward pass, into out.", arg("dy"), arg("x"), arg("call"),
      arg("moments"), arg("out"), arg("threads"));
  def("grad_input", &py_grad_input, "Second half of the backward pass, into out.", arg("dy"), arg("x"), arg("call"),
      arg("moments"), arg("sums"), arg("out"), arg("dresidual"), arg("threads"));
  def("backward", &py_backward, "Gradients of batch_norm.", arg("dy"), arg("x"), arg("call"), arg("moments"),
      arg("out"), arg("dresidual"), arg("dgamma"), arg("dbeta"), arg("threads"));
  def("normalize_backward", &py_normalize_backward, "Gradients of normalize.", arg("dy"), arg("x"), arg("call"),
      arg("mean"), arg("var"), arg("out"), arg("dresidual"), arg("dgamma"), arg("dbeta"), arg("threads"));
  def("jvp", &py_jvp, "Derivative of batch_norm along tangents, into out.", arg("x_dot"), arg("x"), arg("call"),
      arg("moments"), arg("gamma_dot"), arg("beta_dot"), arg("out"), arg("threads"));
  def("normalize_jvp", &py_normalize_jvp, "Derivative of normalize along tangents, into out.", arg("x_dot"), arg("x"),
      arg("call"), arg("mean"), arg("var"), arg("mean_dot"), arg("var_dot"), arg("gamma_dot"), arg("beta_dot"),
      arg("out"), arg("threads"));
  def("double_backward", &py_double_backward, "Gradients of backward, of one set.", arg("v_dx"), arg("dy"), arg("x"),
      arg("call"), arg("moments"), arg("v_dgamma"), arg("v_dbeta"), arg("ddy"), arg("dx"), arg("dgamma"),
      arg("threads"));
  def("normalize_double_backward", &py_normalize_double_backward, "Gradients of normalize_backward.", arg("v_dx"),
      arg("dy"), arg("x"), arg("call"), arg("mean"), arg("var"), arg("v_dgamma"), arg("v_dbeta"), arg("ddy"), arg("dx"),
      arg("dgamma"), arg("threads"));
}

}  // namespace batchnorm::bindings
