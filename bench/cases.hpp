// The shapes that are measured, by name, with where they come from.
#pragma once

#include <array>
#include <cstdint>

#include "batchnorm/types.hpp"

namespace bench {

struct Case {
  const char* name;
  const char* origin;
  batchnorm::Problem problem;
};

// NCHW is {N, C, H*W}, NHWC is {N*H*W, C, 1}, (N, C) is {N, C, 1}.
inline constexpr std::array kCases = {
    Case{"stem-nchw", "ResNet-50 conv1, batch 32", {32, 64, 112 * 112}},
    Case{"stem-nhwc", "ResNet-50 conv1, batch 32", {32 * 112 * 112, 64, 1}},
    Case{"res2-nchw", "ResNet-50 res2 expand, batch 32", {32, 256, 56 * 56}},
    Case{"res2-nhwc", "ResNet-50 res2 expand, batch 32", {32 * 56 * 56, 256, 1}},
    Case{"res3-nchw", "ResNet-50 res3 expand, batch 32", {32, 512, 28 * 28}},
    Case{"res3-nhwc", "ResNet-50 res3 expand, batch 32", {32 * 28 * 28, 512, 1}},
    Case{"res4-nchw", "ResNet-50 res4 expand, batch 32", {32, 1024, 14 * 14}},
    Case{"res4-nhwc", "ResNet-50 res4 expand, batch 32", {32 * 14 * 14, 1024, 1}},
    Case{"res5-nchw", "ResNet-50 res5 expand, batch 32", {32, 2048, 7 * 7}},
    Case{"res5-nhwc", "ResNet-50 res5 expand, batch 32", {32 * 7 * 7, 2048, 1}},
    Case{"rgb-nchw", "images before the first layer", {8, 3, 224 * 224}},
    Case{"rgb-nhwc", "images before the first layer", {8 * 224 * 224, 3, 1}},
    Case{"wide-nc", "(N, C) of a wide perceptron", {65536, 256, 1}},
    Case{"table-nc", "(N, C) of tabular data", {4096, 100, 1}},
    Case{"cached-nchw", "inside the second-level cache", {8, 32, 16 * 16}},
    Case{"tiny-nchw", "where the call itself counts", {4, 16, 8 * 8}},
    Case{"tiny-nc", "where the call itself counts", {32, 64, 1}},
};

}  // namespace bench
