// Batch normalization with what mostly follows it, in the same pass over memory: a residual is added, then ReLU.
//
//     s = (x - mean)*rstd*gamma + beta + residual,  y = max(s, 0)       (He et al. 2016, figure 2)
//
// The bits of y are those of normalizing in float (double for double tensors), adding and taking the maximum one after
// the other; for Float16 and BFloat16 with a single rounding at the end. NaN and -0 stay what they are. The backward
// pass wants x and a mask: one bit an element, whether s was above 0 (or NaN), through which dy is let.
//
// What batchnorm.hpp says of all its functions holds here too.
#pragma once

#include <cstdint>
#include <span>

#include "batchnorm/types.hpp"

namespace batchnorm {

// Bytes of a mask: one bit for each element, and up to 24 bytes. A mask is written and read by the functions below; its
// first byte says where its bits begin. A mask of other content lets other elements through, and harms nothing else.
[[nodiscard]] std::int64_t relu_mask_bytes(const Problem& problem);

// Training, as batch_norm() does. residual: problem.size() values, or empty for none. mask: relu_mask_bytes(problem)
// bytes for the backward pass, or empty for none, apart from all else. y may be exactly x or exactly residual.
template <class T>
void batch_norm_relu(std::span<const T> x, const Problem& problem, std::span<const T> residual, ChannelValues gamma,
                     ChannelValues beta, double eps, std::span<T> y, std::span<std::uint8_t> mask,
                     std::span<Moments> saved, const Options& options = {});

// Inference, as normalize() does.
template <class T>
void normalize_relu(std::span<const T> x, const Problem& problem, std::span<const T> residual, ChannelValues mean,
                    ChannelValues var, ChannelValues gamma, ChannelValues beta, double eps, std::span<T> y,
                    std::span<std::uint8_t> mask, const Options& options = {});

// Gradients of batch_norm_relu(). With dy let through the mask as dresidual, those of batch_norm() by dresidual:
//     dresidual = dy where the mask is set, else 0,  dbeta = sum(dresidual),  dgamma = sum(dresidual*xhat)
//     dx = gamma*rstd*(dresidual - dbeta/n - xhat*dgamma/n)
// dx, dresidual: problem.size() values each; each may be exactly dy or exactly x, must not overlap these otherwise, nor
// each other. What is empty is not computed.
template <class T>
void batch_norm_relu_backward(std::span<const T> dy, std::span<const T> x, const Problem& problem,
                              std::span<const std::uint8_t> mask, std::span<const Moments> saved, ChannelValues gamma,
                              double eps, std::span<T> dx, std::span<T> dresidual, ChannelOutput dgamma,
                              ChannelOutput dbeta, const Options& options = {});

// Gradients of normalize_relu(), whose statistics are constants: dx = gamma*rstd*dresidual. x is read only where dgamma
// is asked for.
template <class T>
void normalize_relu_backward(std::span<const T> dy, std::span<const T> x, const Problem& problem,
                             std::span<const std::uint8_t> mask, ChannelValues mean, ChannelValues var,
                             ChannelValues gamma, double eps, std::span<T> dx, std::span<T> dresidual,
                             ChannelOutput dgamma, ChannelOutput dbeta, const Options& options = {});

}  // namespace batchnorm
