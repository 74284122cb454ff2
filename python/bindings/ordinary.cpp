// try_batch_norm and its like: the ordinary call whole, from Python's arguments to the results, or not at all.
//
// On a small tensor, checking and converting arguments one by one in Python and again in pybind11 takes several times
// as long as the arithmetic. These are plain CPython functions. Where an argument is not ordinary, or the core refuses
// what it says, they return None and have changed nothing but spare arrays (`into`): the Python layer then takes the
// general way, on which every error is reported.
#include "ordinary.hpp"

#include <algorithm>
#include <exception>

#include "arrays.hpp"
#include "batchnorm/batchnorm.hpp"
#include "method.hpp"
#include "release_for_work.hpp"

namespace batchnorm::bindings {
namespace {

PyObject* not_ordinary() { Py_RETURN_NONE; }

// Whether f(T{}), T being the type of the values of x, did its work. The core throws before it writes.
template <class F>
bool done(const Array& x, F&& f) {
  try {
    const ReleaseForWork gil(x.size());
    x.is_double ? f(double{}) : f(float{});
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

py::array new_like(const Array& x) { return new_array(x.is_double ? kFloat64 : kFloat32, x.dimensions, x.shape); }

// `out`, or a new array for it where the caller gave none.
py::object target(const Array& out, const Array& x) {
  return out.present() ? py::reinterpret_borrow<py::object>(out.object) : new_like(x);
}

template <class T>
std::span<T> values_of(const py::object& array) {
  const auto& a = static_cast<const py::array&>(array);
  return {static_cast<T*>(const_cast<void*>(a.data())), static_cast<std::size_t>(a.size())};
}

template <class T>
std::span<T> values_or_none(const py::object& array) {
  return array.is_none() ? std::span<T>{} : values_of<T>(array);
}

// A new array of one gradient per channel in the type of gamma (float64 where there is none); None where not wanted.
class ChannelGradient {
 public:
  ChannelGradient(bool wanted, std::int64_t channels, const Array& gamma) : object_(py::none()) {
    if (!wanted) return;
    const py::ssize_t shape = channels;
    const bool is_double = !gamma.present() || gamma.is_double;
    object_ = new_array(is_double ? kFloat64 : kFloat32, 1, &shape);
    output_ = is_double ? ChannelOutput(values_of<double>(object_)) : ChannelOutput(values_of<float>(object_));
  }
  [[nodiscard]] const ChannelOutput& output() const { return output_; }
  [[nodiscard]] PyObject* object() const { return object_.ptr(); }

 private:
  py::object object_;
  ChannelOutput output_;
};

py::object owned(PyObject* created) {
  if (created == nullptr) throw PythonError{};
  return py::reinterpret_steal<py::object>(created);
}

// What a call returns is made before the core works, so that no memory is asked for once something is written.
template <class... Part>
py::object called(PyObject* f, const Part&... arguments) {
  PyObject* const all[] = {arguments...};
  return owned(PyObject_Vectorcall(f, all, sizeof...(Part), nullptr));
}
// A tuple of the given type, which may be a NamedTuple.
template <class... Part>
py::object tuple_of(PyObject* type, const Part&... items) {
  const py::object plain = owned(PyTuple_Pack(sizeof...(Part), items...));
  if (!PyType_Check(type) || !PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(type), &PyTuple_Type)) {
    throw py::type_error("the type of a result must be one of tuples");
  }
  const py::object arguments = owned(PyTuple_Pack(1, plain.ptr()));
  return owned(PyTuple_Type.tp_new(reinterpret_cast<PyTypeObject*>(type), arguments.ptr(), nullptr));
}

PyObject* try_moments(PyObject* const (&arguments)[3]) {
  const auto& [py_x, py_axis, py_threads] = arguments;
  Arguments a;
  const Array x = a.tensor(py_x);
  const Problem problem = a.problem(x, a.axis(py_axis, x));
  const int threads = a.threads(py_threads);
  if (!a.ordinary()) return not_ordinary();

  py::array result = new_table<Moments>(problem.channels);
  if (!done(x, [&]<class T>(T) { moments<T>(x.values<const T>(), problem, rows<Moments>(result), {threads}); })) {
    return not_ordinary();
  }
  return result.release().ptr();
}

// The tuple of a Problem's sizes.
py::object sizes_of(const Problem& p) { return owned(Py_BuildValue("(LLL)", p.outer, p.channels, p.inner)); }

// What the core counts by, in the type of x: weights, or 0 and 1 for a mask; None where all counts.
py::object weights_of(const Options& options, const Problem& problem, const Array& x) {
  if (!options.counts()) return py::none();
  const py::ssize_t size = problem.outer * problem.inner;
  py::array weights = new_array(x.is_double ? kFloat64 : kFloat32, 1, &size);
  if (options.weights.present()) {
    std::copy_n(options.weights.data, options.weights.bytes, static_cast<char*>(weights.mutable_data()));
  } else if (x.is_double) {
    std::copy_n(options.mask, size, static_cast<double*>(weights.mutable_data()));
  } else {
    std::copy_n(options.mask, size, static_cast<float*>(weights.mutable_data()));
  }
  return weights;
}

// Where ghosts of so many rows begin, and the last ends; None where there are none.
py::object offsets_of(std::int64_t ghost_size, std::int64_t rows) {
  if (ghost_size == 0) return py::none();
  const py::ssize_t size = (rows + ghost_size - 1) / ghost_size + 1;
  py::array offsets = new_array(kInt64, 1, &size);
  auto* const to = static_cast<std::int64_t*>(offsets.mutable_data());
  for (py::ssize_t s = 0; s < size; ++s) to[s] = std::min(s * ghost_size, rows);
  return offsets;
}

// Whether channels are the second axis, and each ghost has two values of each.
bool fits_ghosts(const Problem& problem, int axis, std::int64_t ghost_size) {
  if (ghost_size == 0) return true;
  const std::int64_t first = std::min(ghost_size, problem.outer), last = problem.outer % ghost_size;
  return axis == 1 && first * problem.inner >= 2 && (last == 0 || last * problem.inner >= 2);
}

// Room for the bits of a ReLU, which Python may not write to.
py::object new_bits(const Problem& problem) {
  const py::ssize_t size = relu_mask_bytes(problem);
  py::array bits = new_array(kUint8, 1, &size);
  py::detail::array_proxy(bits.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
  return bits;
}

// The bytes of those bits.
std::span<std::uint8_t> bits_of(const py::object& bits) {
  if (bits.is_none()) return {};
  const auto& a = static_cast<const py::array&>(bits);
  return {static_cast<std::uint8_t*>(const_cast<void*>(a.data())), static_cast<std::size_t>(a.size())};
}

// (y, keep(x or None where y overwrites it, moments, gamma, axis from 0, eps)); with options, or what shares statistics
// (Shares), keep is told more: x, its sizes, weights, offsets and the bits of ReLU or None for each, the options, and
// what shares. keep is called before what it is given is filled.
PyObject* try_batch_norm(PyObject* const (&arguments)[10]) {
  const auto& [py_keep, py_x, py_gamma, py_beta, py_axis, py_eps, py_out, py_threads, py_options, py_shares] =
      arguments;
  Arguments a;
  const Array x = a.tensor(py_x);
  const int axis = a.axis(py_axis, x);
  const Problem problem = a.problem(x, axis);
  const Array gamma = a.channel_values_or_none(py_gamma, problem.channels);
  const Array beta = a.channel_values_or_none(py_beta, problem.channels);
  const double eps = a.eps(py_eps);
  const Options options = a.options(py_options, x, axis);
  const Array out = a.out(py_out, {x, options.residual.present() ? options.residual : x}, {gamma, beta});
  const int threads = a.threads(py_threads);
  const Shares shares = a.shares(py_shares, x, axis, problem);
  // Of a position a weight says no more than whether it counts.
  a.need(!shares.present() || (options.ghost_size == 0 && !(shares.groups.each_position && options.weights.present())));
  a.need(shares.present() || problem.count() >= 2);
  if (!a.ordinary() || !fits_ghosts(problem, axis, options.ghost_size)) return not_ordinary();
  const std::int64_t rows_a_set = shares.of_samples ? problem.outer / x.shape[0] : options.ghost_size;

  const py::object y = target(out, x);
  const py::object weights = weights_of(options, problem, x), offsets = offsets_of(rows_a_set, problem.outer);
  const std::int64_t positions = rows_a_set * problem.inner;
  if (shares.of_samples && shares.groups.width == 1 &&
      (x.is_double ? has_lone_position(values_or_none<double>(weights), positions)
                   : has_lone_position(values_or_none<float>(weights), positions))) {
    return not_ordinary();
  }
  const py::object bits = options.relu ? new_bits(problem) : py::none();
  const auto groups = values_or_none<const std::int64_t>(offsets);
  const std::int64_t sets = groups.empty() ? 1 : static_cast<std::int64_t>(groups.size()) - 1;
  py::array moments = new_table<Moments>(shares.entries(problem, sets));
  const bool overwritten = out.data == x.data;
  const py::object axis_from_0 = owned(PyLong_FromLong(axis));
  PyObject* const kept = overwritten ? Py_None : x.object;
  const py::object saved =
      !options.present() && !shares.present()
          ? called(py_keep, kept, moments.ptr(), py_gamma, axis_from_0.ptr(), py_eps)
          : called(py_keep, kept, moments.ptr(), py_gamma, axis_from_0.ptr(), py_eps, x.object, sizes_of(problem).ptr(),
                   weights.ptr(), offsets.ptr(), bits.ptr(), py_options, py_shares);
  py::object result = owned(PyTuple_Pack(2, y.ptr(), saved.ptr()));
  if (!done(x, [&]<class T>(T) {
        const Call<T> call{.problem = problem,
                           .groups = {groups, shares.groups.width, shares.groups.each_position, shares.groups.about},
                           .counted = {values_or_none<T>(weights), options.padding},
                           .gamma = gamma.channel_values(),
                           .beta = beta.channel_values(),
                           .eps = eps,
                           .tail = {options.residual.values<const T>(), options.relu, bits_of(bits)}};
        batch_norm<T>(x.values<const T>(), call, values_of<T>(y), rows<Moments>(moments), {threads});
      })) {
    return not_ordinary();
  }
  return result.release().ptr();
}

PyObject* try_normalize(PyObject* const (&arguments)[10]) {
  const auto& [py_x, py_mean, py_var, py_gamma, py_beta, py_axis, py_eps, py_out, py_threads, py_options] = arguments;
  Arguments a;
  const Array x = a.tensor(py_x);
  const int axis = a.axis(py_axis, x);
  const Problem problem = a.problem(x, axis);
  const Array mean = a.channel_values(py_mean, problem.channels), var = a.channel_values(py_var, problem.channels);
  const Array gamma = a.channel_values_or_none(py_gamma, problem.channels);
  const Array beta = a.channel_values_or_none(py_beta, problem.channels);
  const double eps = a.eps(py_eps);
  Options options = a.options(py_options, x, axis);
  a.need(!options.weights.present() && options.ghost_size == 0);
  // By given statistics a mask says no more than where there is padding.
  if (options.padding == Padding::normalize) options.mask = nullptr;
  const Array& added = options.residual.present() ? options.residual : x;
  const Array out = a.out(py_out, {x, added}, {mean, var, gamma, beta});
  const int threads = a.threads(py_threads);
  if (!a.ordinary()) return not_ordinary();

  py::object y = target(out, x);
  const py::object weights = weights_of(options, problem, x);
  if (!done(x, [&]<class T>(T) {
        const Call<T> call{.problem = problem,
                           .counted = {values_or_none<T>(weights), options.padding},
                           .gamma = gamma.channel_values(),
                           .beta = beta.channel_values(),
                           .eps = eps,
                           .tail = {options.residual.values<const T>(), options.relu, {}}};
        normalize<T>(x.values<const T>(), call, mean.channel_values(), var.channel_values(), values_of<T>(y),
                     {threads});
      })) {
    return not_ordinary();
  }
  return y.release().ptr();
}

// A tuple of that type of (dx, dgamma, dbeta, dresidual), None where not asked for.
PyObject* try_batch_norm_backward(PyObject* const (&arguments)[17]) {
  const auto& [type, py_dy, py_x, py_moments, py_gamma, py_axis, py_eps, py_needs, py_out, py_threads, py_weights,
               py_padding, py_bits, has_residual, py_offsets, py_width, py_about] = arguments;
  Arguments a;
  const Array x = a.tensor(py_x), dy = a.tensor_like(x, py_dy);
  const Problem problem = a.problem(x, a.integer(py_axis, 0, x.dimensions - 1));
  const std::vector<std::int64_t> offsets = a.offsets(py_offsets, x, problem);
  const int width = a.integer(py_width, 1, INT_MAX), about = a.integer(py_about, 0, 2);  // 1, 2: of each position
  if (!a.need(problem.channels % std::max(width, 1) == 0)) return not_ordinary();
  const Shares shares{.groups = {offsets, width, about > 0, about == 2 ? About::zero : About::mean}};
  const std::int64_t sets = offsets.empty() ? 1 : static_cast<std::int64_t>(offsets.size()) - 1;
  const auto moments = a.table<Moments>(py_moments, a.ordinary() ? shares.entries(problem, sets) : 0);
  const Array gamma = a.channel_values_or_none(py_gamma, problem.channels);
  const double eps = a.eps(py_eps);
  const Needs needs = a.needs(py_needs);
  const Array weights = a.weights(py_weights, x);
  const auto padding = static_cast<Padding>(a.integer(py_padding, 0, 2));
  const std::span<std::uint8_t> bits = a.bits(py_bits);
  const Array out = a.out(py_out, {x, dy}, {gamma});
  const int threads = a.threads(py_threads);
  if (!a.ordinary()) return not_ordinary();

  const py::object dx = needs.x ? target(out, x) : py::none();
  const py::object dresidual = needs.residual && has_residual == Py_True ? py::object(new_like(x)) : py::none();
  const ChannelGradient dgamma(needs.gamma, problem.channels, gamma), dbeta(needs.beta, problem.channels, gamma);
  py::object result = tuple_of(type, dx.ptr(), dgamma.object(), dbeta.object(), dresidual.ptr());
  if (!done(x, [&]<class T>(T) {
        const Call<T> call{.problem = problem,
                           .groups = shares.groups,
                           .counted = {weights.values<const T>(), padding},
                           .gamma = gamma.channel_values(),
                           .eps = eps,
                           .tail = {{}, !bits.empty(), bits}};
        const Gradients<T> to{values_or_none<T>(dx), values_or_none<T>(dresidual), dgamma.output(), dbeta.output()};
        batch_norm_backward<T>(dy.values<const T>(), x.values<const T>(), call, moments, to, {threads});
      })) {
    return not_ordinary();
  }
  return result.release().ptr();
}

PyObject* try_normalize_backward(PyObject* const (&arguments)[11]) {
  const auto& [type, py_dy, py_x, py_mean, py_var, py_gamma, py_axis, py_eps, py_needs, py_out, py_threads] = arguments;
  Arguments a;
  const Array x = a.tensor(py_x), dy = a.tensor_like(x, py_dy);
  const Problem problem = a.problem(x, a.axis(py_axis, x));
  const Array mean = a.channel_values(py_mean, problem.channels), var = a.channel_values(py_var, problem.channels);
  const Array gamma = a.channel_values_or_none(py_gamma, problem.channels);
  const double eps = a.eps(py_eps);
  const Needs needs = a.needs(py_needs);
  const Array out = a.out(py_out, {x, dy}, {mean, var, gamma});
  const int threads = a.threads(py_threads);
  if (!a.ordinary()) return not_ordinary();

  const py::object dx = needs.x ? target(out, x) : py::none();
  const ChannelGradient dgamma(needs.gamma, problem.channels, gamma), dbeta(needs.beta, problem.channels, gamma);
  py::object result = tuple_of(type, dx.ptr(), dgamma.object(), dbeta.object(), Py_None);
  if (!done(x, [&]<class T>(T) {
        normalize_backward<T>(dy.values<const T>(), x.values<const T>(), problem, mean.channel_values(),
                              var.channel_values(), gamma.channel_values(), eps,
                              needs.x ? values_of<T>(dx) : std::span<T>{}, dgamma.output(), dbeta.output(), {threads});
      })) {
    return not_ordinary();
  }
  return result.release().ptr();
}

// New (running_mean, running_var). Or, where the last two of `into` are arrays for them, whether they were written: not
// where nothing counts, and where the moments must be finite and are not. Then no memory is asked for, so that it may
// follow a call that has written.
PyObject* try_update_running(PyObject* const (&arguments)[7]) {
  const auto& [py_mean, py_var, py_moments, py_update_rate, py_ddof, py_into, py_finite] = arguments;
  Arguments a;
  const Array mean = a.array(py_mean);
  const py::ssize_t channels = mean.size();
  const Array var = a.channel_values(py_var, channels);
  a.need(mean.is_double && mean.dimensions == 1 && var.is_double);
  const auto moments = a.table<Moments>(py_moments, channels);
  const double update_rate = a.number(py_update_rate, 0, 1);
  const int ddof = a.integer(py_ddof, 0, INT_MAX);
  const bool given = py_into != Py_None;
  Array new_mean, new_var;
  if (given && a.need(PyTuple_CheckExact(py_into) && PyTuple_GET_SIZE(py_into) >= 2)) {
    const py::ssize_t last = PyTuple_GET_SIZE(py_into) - 1;
    new_mean = a.out(PyTuple_GET_ITEM(py_into, last - 1), {mean}, {var});
    new_var = a.out(PyTuple_GET_ITEM(py_into, last), {var}, {mean});
    a.need(new_mean.present() && new_var.present());
  }
  if (!a.ordinary()) return not_ordinary();
  const bool nothing = std::ranges::all_of(moments, [](const Moments& m) { return m.count == 0; });
  if (given && (nothing || (py_finite == Py_True && first_nonfinite(moments) >= 0))) return Py_NewRef(Py_False);

  const py::object made_mean = given ? py::object() : new_like(mean), made_var = given ? py::object() : new_like(var);
  const auto to_mean = given ? new_mean.values<double>() : values_of<double>(made_mean);
  const auto to_var = given ? new_var.values<double>() : values_of<double>(made_var);
  if (!done(mean, [&](auto) {
        std::ranges::copy(mean.values<const double>(), to_mean.begin());
        std::ranges::copy(var.values<const double>(), to_var.begin());
        update_running(to_mean, to_var, moments, update_rate, ddof);
      })) {
    return not_ordinary();
  }
  return given ? Py_NewRef(Py_True) : PyTuple_Pack(2, made_mean.ptr(), made_var.ptr());
}

// The moments of a union, and its mean and variance, written to the arrays of `into`; whether they may be used: not
// where nothing counts, and where the union must be finite and is not. One value has no variance, nor have counts of
// less than 2: it is 1 there. Asks for no memory; `pooled` may be the table that is written to.
PyObject* pool(PyObject* const (&arguments)[5]) {
  const auto& [py_pooled, py_moments, py_ddof, py_into, py_finite] = arguments;
  Arguments a;
  const py::ssize_t channels = a.array(py_moments).size() / 5;
  const auto pooled = a.table<Moments>(py_pooled, channels), moments = a.table<Moments>(py_moments, channels);
  const int ddof = a.integer(py_ddof, 0, 1);
  if (!a.need(PyTuple_CheckExact(py_into) && PyTuple_GET_SIZE(py_into) == 3)) return not_ordinary();
  const auto to_table = a.table<Moments>(PyTuple_GET_ITEM(py_into, 0), channels);
  const Array to_mean = a.channel_values(PyTuple_GET_ITEM(py_into, 1), channels);
  const Array to_var = a.channel_values(PyTuple_GET_ITEM(py_into, 2), channels);
  a.need(to_mean.is_double && to_var.is_double);
  if (!a.ordinary()) return not_ordinary();
  const bool nothing = std::ranges::all_of(moments, [](const Moments& m) { return m.count == 0; });
  if (nothing) return Py_NewRef(Py_False);

  for (std::size_t c = 0; c < moments.size(); ++c) {
    const Moments both = merge(pooled[c], moments[c]);
    const bool has_no_variance = ddof > 0 ? both.count < 2 : both.count <= 1 && both.m2 == 0;
    const_cast<Moments&>(to_table[c]) = both;  // of an array that Python has made for this, and made read-only
    to_mean.values<double>()[c] = both.mean;
    to_var.values<double>()[c] = has_no_variance ? 1 : variance(both, ddof);
  }
  // Two finite batches far from each other may have a union beyond float64.
  return Py_NewRef(py_finite == Py_True && first_nonfinite(to_table) >= 0 ? Py_False : Py_True);
}

// A copy of gamma, and room for new statistics like `mean`: what a layer's call has to have before it writes.
PyObject* room(PyObject* const (&arguments)[2]) {
  const auto& [py_gamma, py_mean] = arguments;
  Arguments a;
  const Array gamma = a.array(py_gamma), mean = a.array(py_mean);
  if (!a.ordinary()) return not_ordinary();

  py::array copy = new_like(gamma);
  std::copy_n(gamma.data, gamma.bytes, static_cast<char*>(copy.mutable_data()));
  const py::object new_mean = new_like(mean), new_var = new_like(mean);
  return PyTuple_Pack(3, copy.ptr(), new_mean.ptr(), new_var.ptr());
}

// to = a*x + b*y, where a and b, y may be None for 1 and 0. Arrays of one size; all but `to` of float64. Asks for no
// memory, so that it may follow a call that has written.
PyObject* combine(PyObject* const (&arguments)[5]) {
  Arguments given;
  const Array to = given.array(arguments[0]);
  Array in[4];  // a, x, b, y
  for (int k = 0; k < 4; ++k) {
    if (arguments[k + 1] == Py_None && k != 1) continue;
    in[k] = given.array(arguments[k + 1]);
    given.need(in[k].is_double && in[k].size() == to.size());
  }
  if (!given.ordinary()) {
    // No channels are no ordinary array, and nothing to do.
    if (PyObject_Size(arguments[0]) == 0) Py_RETURN_NONE;
    PyErr_Clear();  // it may have none
    throw py::type_error("combine must have arrays of one size, of float64 but for the first");
  }
  const auto value = [](const Array& a, std::int64_t c, double absent) {
    return a.present() ? a.values<const double>()[static_cast<std::size_t>(c)] : absent;
  };
  for (std::int64_t c = 0; c < to.size(); ++c) {
    // Volatile: a product that is added is rounded first, on machines that could do both at once too.
    const volatile double first = value(in[0], c, 1) * value(in[1], c, 0);
    const volatile double second = value(in[2], c, 1) * value(in[3], c, 0);
    const double sum = in[3].present() ? first + second : first;
    const auto at = static_cast<std::size_t>(c);
    to.is_double ? void(to.values<double>()[at] = sum) : void(to.values<float>()[at] = static_cast<float>(sum));
  }
  Py_RETURN_NONE;
}

}  // namespace

void add_ordinary_calls(py::module_& m) {
  // The first line of each text is the signature, in the form that inspect.signature reads.
  static PyMethodDef methods[] = {
      method<3, try_moments>("try_moments",
                             "try_moments($module, x, axis, threads, /)\n--\n\n"
                             "moments if all arguments are ordinary."),
      method<10, try_batch_norm>(
          "try_batch_norm",
          "try_batch_norm($module, keep, x, gamma, beta, axis, eps, out, threads, options, shares, /)\n--\n\n"
          "batch_norm if all arguments are ordinary: y, keep(x, moments, gamma, axis, eps, ...)."),
      method<10, try_normalize>(
          "try_normalize",
          "try_normalize($module, x, mean, var, gamma, beta, axis, eps, out, threads, options, /)\n--\n\n"
          "normalize if all arguments are ordinary: y."),
      method<17, try_batch_norm_backward>(
          "try_batch_norm_backward",
          "try_batch_norm_backward($module, type, dy, x, moments, gamma, axis, eps, needs, out, threads, weights, "
          "padding, bits, has_residual, offsets, width, about, /)\n--\n\n"
          "batch_norm_backward if all arguments are ordinary: type(dx, dgamma, dbeta, dresidual)."),
      method<11, try_normalize_backward>(
          "try_normalize_backward",
          "try_normalize_backward($module, type, dy, x, mean, var, gamma, axis, eps, needs, out, threads, /)\n--\n\n"
          "normalize_backward if all arguments are ordinary: type(dx, dgamma, dbeta, None)."),
      method<7, try_update_running>(
          "try_update_running",
          "try_update_running($module, mean, var, moments, update_rate, ddof, into, finite, /)\n--\n\n"
          "update_running if all arguments are ordinary: mean, var; or whether `into` was written."),
      method<5, pool>(
          "pool",
          "pool($module, pooled, moments, ddof, into, finite, /)\n--\n\n"
          "Merge moments into those pooled, if all are ordinary: whether `into` (table, mean, var) was written."),
      method<2, room>("room",
                      "room($module, gamma, mean, /)\n--\n\n"
                      "A copy of gamma and two new arrays like mean, if both are ordinary."),
      method<5, combine>("combine",
                         "combine($module, to, a, x, b, y, /)\n--\n\n"
                         "to = a*x + b*y without asking for memory; None: a and b are 1, y is 0."),
      {nullptr, nullptr, 0, nullptr},
  };
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace batchnorm::bindings
