// The shapes that are measured, by name, with where they come from. There is no other list of cases.
//
// Those of oneDNN are all distinct shapes of its batch norm benchmark's inputs (tests/benchdnn/inputs/bnorm, commit
// 515bfba68c0254e23c876d4c1a7cc26c2d4b690b) that it runs, with float32 or with the data type that the including file
// sets; each under the first file that has it. A shape of rank 3 or 5 is a case like any other.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "batchnorm/types.hpp"

namespace bench {

// N, C, then up to three spatial sizes; 0 means that there is none.
using Shape = std::array<std::int64_t, 5>;

struct Case {
  const char* name;  // <group>-<shape>; unique
  const char* origin;
  Shape shape;
};

// Channels first (NCW, NCHW, NCDHW) and channels last (NWC, NHWC, NDHWC) where there is more than one value a channel
// and sample; else both are the same, and called (N, C).
enum class Layout { nchw, nhwc, nc };
constexpr const char* name_of(Layout layout) {
  return layout == Layout::nchw ? "nchw" : layout == Layout::nhwc ? "nhwc" : "nc";
}

constexpr std::int64_t spatial_size(const Shape& shape) {
  std::int64_t size = 1;
  for (std::size_t axis = 2; axis < shape.size() && shape[axis] > 0; ++axis) size *= shape[axis];
  return size;
}

inline std::vector<Layout> layouts_of(const Shape& shape) {
  if (spatial_size(shape) == 1) return {Layout::nc};
  return {Layout::nchw, Layout::nhwc};
}

constexpr batchnorm::Problem problem_of(const Shape& shape, Layout layout) {
  if (layout == Layout::nchw) return {.outer = shape[0], .channels = shape[1], .inner = spatial_size(shape)};
  return {.outer = shape[0] * spatial_size(shape), .channels = shape[1], .inner = 1};
}

inline constexpr const char* kFwksExt = "oneDNN benchdnn, option_set_fwks_ext_gpu";
inline constexpr const char* kFwksKey = "oneDNN benchdnn, option_set_fwks_key_gpu";
inline constexpr const char* kShapes1d = "oneDNN benchdnn, shapes_1d";
inline constexpr const char* kShapes2d = "oneDNN benchdnn, shapes_2d";
inline constexpr const char* kShapes3d = "oneDNN benchdnn, shapes_3d";
inline constexpr const char* kShapesCi = "oneDNN benchdnn, shapes_ci";
inline constexpr const char* kDenseNet = "oneDNN benchdnn, shapes_densenet_121";
inline constexpr const char* kGoogLeNetV2 = "oneDNN benchdnn, shapes_googlenet_v2";
inline constexpr const char* kGoogLeNetV3 = "oneDNN benchdnn, shapes_googlenet_v3";
inline constexpr const char* kLarge = "oneDNN benchdnn, shapes_large";
inline constexpr const char* kRegressions = "oneDNN benchdnn, shapes_regressions";
inline constexpr const char* kResNet = "oneDNN benchdnn, shapes_resnet_50";
inline constexpr const char* kTestGpu = "oneDNN benchdnn, test_bnorm_gpu";

// clang-format off
inline constexpr std::array kCases = {
    // ResNet-50, batch 32
    Case{"resnet50-32x64x112x112", "ResNet-50 conv1, batch 32", {32, 64, 112, 112}},
    Case{"resnet50-32x64x56x56", "ResNet-50 conv2 1x1 and 3x3, batch 32", {32, 64, 56, 56}},
    Case{"resnet50-32x256x56x56", "ResNet-50 conv2 expand, batch 32", {32, 256, 56, 56}},
    Case{"resnet50-32x128x56x56", "ResNet-50 conv3 first 1x1, batch 32", {32, 128, 56, 56}},
    Case{"resnet50-32x128x28x28", "ResNet-50 conv3 1x1 and 3x3, batch 32", {32, 128, 28, 28}},
    Case{"resnet50-32x512x28x28", "ResNet-50 conv3 expand, batch 32", {32, 512, 28, 28}},
    Case{"resnet50-32x256x28x28", "ResNet-50 conv4 first 1x1, batch 32", {32, 256, 28, 28}},
    Case{"resnet50-32x256x14x14", "ResNet-50 conv4 1x1 and 3x3, batch 32", {32, 256, 14, 14}},
    Case{"resnet50-32x1024x14x14", "ResNet-50 conv4 expand, batch 32", {32, 1024, 14, 14}},
    Case{"resnet50-32x512x14x14", "ResNet-50 conv5 first 1x1, batch 32", {32, 512, 14, 14}},
    Case{"resnet50-32x512x7x7", "ResNet-50 conv5 1x1 and 3x3, batch 32", {32, 512, 7, 7}},
    Case{"resnet50-32x2048x7x7", "ResNet-50 conv5 expand, batch 32", {32, 2048, 7, 7}},
    // DenseNet-121, batch 32, where ResNet-50 has no layer of the same shape
    Case{"densenet121-32x96x56x56", "DenseNet-121 block 1, batch 32", {32, 96, 56, 56}},
    Case{"densenet121-32x160x56x56", "DenseNet-121 block 1, batch 32", {32, 160, 56, 56}},
    Case{"densenet121-32x224x56x56", "DenseNet-121 block 1, batch 32", {32, 224, 56, 56}},
    Case{"densenet121-32x160x28x28", "DenseNet-121 block 2, batch 32", {32, 160, 28, 28}},
    Case{"densenet121-32x288x28x28", "DenseNet-121 block 2, batch 32", {32, 288, 28, 28}},
    Case{"densenet121-32x480x28x28", "DenseNet-121 block 2, batch 32", {32, 480, 28, 28}},
    Case{"densenet121-32x128x14x14", "DenseNet-121 bottlenecks of block 3, batch 32", {32, 128, 14, 14}},
    Case{"densenet121-32x320x14x14", "DenseNet-121 block 3, batch 32", {32, 320, 14, 14}},
    Case{"densenet121-32x544x14x14", "DenseNet-121 block 3, batch 32", {32, 544, 14, 14}},
    Case{"densenet121-32x736x14x14", "DenseNet-121 block 3, batch 32", {32, 736, 14, 14}},
    Case{"densenet121-32x992x14x14", "DenseNet-121 block 3, batch 32", {32, 992, 14, 14}},
    Case{"densenet121-32x128x7x7", "DenseNet-121 bottlenecks of block 4, batch 32", {32, 128, 7, 7}},
    Case{"densenet121-32x608x7x7", "DenseNet-121 block 4, batch 32", {32, 608, 7, 7}},
    Case{"densenet121-32x992x7x7", "DenseNet-121 block 4, batch 32", {32, 992, 7, 7}},
    Case{"densenet121-32x1024x7x7", "DenseNet-121 after the last block, batch 32", {32, 1024, 7, 7}},
    // GoogLeNet with batch normalization, batch 32, where the nets above have no layer of the same shape
    Case{"googlenet-32x192x56x56", "GoogLeNet conv3, batch 32", {32, 192, 56, 56}},
    Case{"googlenet-32x32x28x28", "GoogLeNet inception 3a pool projection, batch 32", {32, 32, 28, 28}},
    Case{"googlenet-32x16x28x28", "GoogLeNet inception 3a 5x5 reduction, batch 32", {32, 16, 28, 28}},
    Case{"googlenet-32x96x28x28", "GoogLeNet inception 3a 3x3 reduction, batch 32", {32, 96, 28, 28}},
    Case{"googlenet-32x192x28x28", "GoogLeNet inception 3b 3x3, batch 32", {32, 192, 28, 28}},
    Case{"googlenet-32x208x14x14", "GoogLeNet inception 4a 3x3, batch 32", {32, 208, 14, 14}},
    Case{"googlenet-32x48x14x14", "GoogLeNet inception 4a 5x5, batch 32", {32, 48, 14, 14}},
    Case{"googlenet-32x24x14x14", "GoogLeNet inception 4b 5x5 reduction, batch 32", {32, 24, 14, 14}},
    Case{"googlenet-32x112x14x14", "GoogLeNet inception 4b 3x3 reduction, batch 32", {32, 112, 14, 14}},
    Case{"googlenet-32x144x14x14", "GoogLeNet inception 4d 3x3 reduction, batch 32", {32, 144, 14, 14}},
    Case{"googlenet-32x288x14x14", "GoogLeNet inception 4d 3x3, batch 32", {32, 288, 14, 14}},
    Case{"googlenet-32x160x7x7", "GoogLeNet inception 5a 3x3 reduction, batch 32", {32, 160, 7, 7}},
    Case{"googlenet-32x48x7x7", "GoogLeNet inception 5b 5x5 reduction, batch 32", {32, 48, 7, 7}},
    Case{"googlenet-32x384x7x7", "GoogLeNet inception 5b 1x1, batch 32", {32, 384, 7, 7}},
    // (N, C): perceptrons, from what fits the first-level cache to 268 MB
    Case{"perceptron-32x64", "a hidden layer of 64 units, batch 32", {32, 64}},
    Case{"perceptron-128x256", "a hidden layer of 256 units, batch 128", {128, 256}},
    Case{"perceptron-256x4096", "a hidden layer of 4096 units, batch 256", {256, 4096}},
    Case{"perceptron-1024x1024", "a hidden layer of 1024 units, batch 1024", {1024, 1024}},
    Case{"perceptron-4096x512", "a hidden layer of 512 units, batch 4096", {4096, 512}},
    Case{"perceptron-16384x256", "a hidden layer of 256 units, batch 16384", {16384, 256}},
    Case{"perceptron-65536x64", "a hidden layer of 64 units, batch 65536", {65536, 64}},
    Case{"perceptron-65536x256", "a hidden layer of 256 units, batch 65536", {65536, 256}},
    Case{"perceptron-65536x1024", "a hidden layer of 1024 units, batch 65536", {65536, 1024}},
    // Tabular data: many rows, few columns
    Case{"table-569x30", "a small table, its columns as channels", {569, 30}},
    Case{"table-4096x100", "a table, its columns as channels", {4096, 100}},
    Case{"table-100000x10", "a long table, its columns as channels", {100000, 10}},
    Case{"table-1000000x20", "a very long table, its columns as channels", {1000000, 20}},
    // Tiny, where the call itself counts
    Case{"tiny-2x8x4x4", "where the call itself counts", {2, 8, 4, 4}},
    Case{"tiny-4x16x8x8", "where the call itself counts", {4, 16, 8, 8}},
    Case{"tiny-4x3x32x32", "where the call itself counts", {4, 3, 32, 32}},
    Case{"tiny-8x32x16x16", "where the call itself counts", {8, 32, 16, 16}},
    // Instance norm: each sample has channels of its own, of one small map each
    Case{"instance-1x262144x2x2", "instance norm of 1024 x 256 maps of 2 x 2", {1, 262144, 2, 2}},
    Case{"instance-1x116736x3x3", "instance norm of 456 x 256 maps of 3 x 3", {1, 116736, 3, 3}},
    Case{"instance-1x65536x4x4", "instance norm of 256 x 256 maps of 4 x 4", {1, 65536, 4, 4}},
    Case{"instance-1x21504x7x7", "instance norm of 84 x 256 maps of 7 x 7", {1, 21504, 7, 7}},
    Case{"instance-1x16384x8x8", "instance norm of 64 x 256 maps of 8 x 8", {1, 16384, 8, 8}},
    Case{"instance-1x4096x16x16", "instance norm of 16 x 256 maps of 16 x 16", {1, 4096, 16, 16}},
    // Tokens: layer and RMS norm (train_lines and its like) of language and vision models
    Case{"tokens-8192x256", "8192 tokens of 256 features", {8192, 256}},
    Case{"tokens-8192x384", "8192 tokens of 384 features", {8192, 384}},
    Case{"tokens-8192x512", "8192 tokens of 512 features", {8192, 512}},
    Case{"tokens-8192x768", "8192 tokens of 768 features", {8192, 768}},
    Case{"tokens-8192x1024", "8192 tokens of 1024 features", {8192, 1024}},
    Case{"tokens-8192x2048", "8192 tokens of 2048 features", {8192, 2048}},
    Case{"tokens-8192x4096", "8192 tokens of 4096 features", {8192, 4096}},
    Case{"tokens-8192x8192", "8192 tokens of 8192 features", {8192, 8192}},
    Case{"tokens-1x4096", "one token of 4096 features", {1, 4096}},
    Case{"tokens-32x4096", "32 tokens of 4096 features", {32, 4096}},
    Case{"tokens-512x768", "BERT, one sequence", {512, 768}},
    Case{"tokens-12544x192", "Swin, 56 x 56 patches", {12544, 192}},
    Case{"tokens-131072x128", "queries and keys of 128 features a head", {131072, 128}},
    Case{"tokens-64x16384", "64 tokens of 16384 features", {64, 16384}},
    // Diffusion models: group norm (train_groups and its like)
    Case{"diffusion-2x320x96x96", "U-Net, 768 x 768 pixels", {2, 320, 96, 96}},
    Case{"diffusion-2x640x48x48", "U-Net, 768 x 768 pixels", {2, 640, 48, 48}},
    Case{"diffusion-2x1280x24x24", "U-Net, 768 x 768 pixels", {2, 1280, 24, 24}},
    Case{"diffusion-1x512x96x96", "decoder, 768 x 768 pixels", {1, 512, 96, 96}},
    Case{"diffusion-1x256x384x384", "decoder, 768 x 768 pixels", {1, 256, 384, 384}},
    // Images before the first layer
    Case{"images-64x3x32x32", "64 small photographs", {64, 3, 32, 32}},
    Case{"images-8x3x224x224", "8 photographs", {8, 3, 224, 224}},
    Case{"images-32x3x224x224", "32 photographs", {32, 3, 224, 224}},
    Case{"images-1x3x1080x1920", "one frame of a film", {1, 3, 1080, 1920}},
    Case{"images-128x1x28x28", "128 handwritten digits", {128, 1, 28, 28}},
    // Numbers of channels and sizes of planes that divide by nothing
    Case{"odd-32x60x28x28", "no multiple of a vector", {32, 60, 28, 28}},
    Case{"odd-32x37x7x7", "no multiple of a vector", {32, 37, 7, 7}},
    Case{"odd-8x17x33x31", "no multiple of a vector", {8, 17, 33, 31}},
    Case{"odd-16x100x13x13", "no multiple of a vector", {16, 100, 13, 13}},
    Case{"odd-32x250x14x14", "no multiple of a vector", {32, 250, 14, 14}},
    Case{"odd-5x1x1x997", "no multiple of a vector", {5, 1, 1, 997}},
    // oneDNN benchdnn, tests/benchdnn/inputs/bnorm/option_set_fwks_ext_gpu
    Case{"onednn-14x8x640x1024", kFwksExt, {14, 8, 640, 1024}},
    Case{"onednn-14x16x320x512", kFwksExt, {14, 16, 320, 512}},
    Case{"onednn-14x24x160x256", kFwksExt, {14, 24, 160, 256}},
    Case{"onednn-14x32x80x128", kFwksExt, {14, 32, 80, 128}},
    Case{"onednn-14x40x40x64", kFwksExt, {14, 40, 40, 64}},
    Case{"onednn-14x48x20x32", kFwksExt, {14, 48, 20, 32}},
    Case{"onednn-14x56x10x16", kFwksExt, {14, 56, 10, 16}},
    Case{"onednn-14x256x10x16", kFwksExt, {14, 256, 10, 16}},
    Case{"onednn-14x168x10x16", kFwksExt, {14, 168, 10, 16}},
    Case{"onednn-1024x64x112x112", kFwksExt, {1024, 64, 112, 112}},
    Case{"onednn-1024x128x56x56", kFwksExt, {1024, 128, 56, 56}},
    Case{"onednn-1024x256x56x56", kFwksExt, {1024, 256, 56, 56}},
    Case{"onednn-1024x256x28x28", kFwksExt, {1024, 256, 28, 28}},
    Case{"onednn-1024x512x28x28", kFwksExt, {1024, 512, 28, 28}},
    Case{"onednn-1024x512x14x14", kFwksExt, {1024, 512, 14, 14}},
    Case{"onednn-1024x1024x14x14", kFwksExt, {1024, 1024, 14, 14}},
    Case{"onednn-1024x1024x7x7", kFwksExt, {1024, 1024, 7, 7}},
    Case{"onednn-1024x2048x7x7", kFwksExt, {1024, 2048, 7, 7}},
    // oneDNN benchdnn, tests/benchdnn/inputs/bnorm/option_set_fwks_key_gpu
    Case{"onednn-16x64x112x112", kFwksKey, {16, 64, 112, 112}},
    Case{"onednn-16x64x56x56", kFwksKey, {16, 64, 56, 56}},
    Case{"onednn-16x256x56x56", kFwksKey, {16, 256, 56, 56}},
    Case{"onednn-16x128x56x56", kFwksKey, {16, 128, 56, 56}},
    Case{"onednn-16x128x28x28", kFwksKey, {16, 128, 28, 28}},
    Case{"onednn-16x512x28x28", kFwksKey, {16, 512, 28, 28}},
    Case{"onednn-16x256x28x28", kFwksKey, {16, 256, 28, 28}},
    Case{"onednn-16x256x14x14", kFwksKey, {16, 256, 14, 14}},
    Case{"onednn-16x1024x14x14", kFwksKey, {16, 1024, 14, 14}},
    Case{"onednn-16x512x14x14", kFwksKey, {16, 512, 14, 14}},
    Case{"onednn-16x512x7x7", kFwksKey, {16, 512, 7, 7}},
    Case{"onednn-16x2048x7x7", kFwksKey, {16, 2048, 7, 7}},
    Case{"onednn-1x32x224x224x160", kFwksKey, {1, 32, 224, 224, 160}},
    Case{"onednn-1x64x112x112x80", kFwksKey, {1, 64, 112, 112, 80}},
    Case{"onednn-1x128x56x56x40", kFwksKey, {1, 128, 56, 56, 40}},
    Case{"onednn-1x256x28x28x20", kFwksKey, {1, 256, 28, 28, 20}},
    Case{"onednn-1x320x14x14x10", kFwksKey, {1, 320, 14, 14, 10}},
    Case{"onednn-1x320x7x7x5", kFwksKey, {1, 320, 7, 7, 5}},
    Case{"onednn-128x64x112x112", kFwksKey, {128, 64, 112, 112}},
    Case{"onednn-128x64x56x56", kFwksKey, {128, 64, 56, 56}},
    Case{"onednn-128x256x56x56", kFwksKey, {128, 256, 56, 56}},
    Case{"onednn-128x128x56x56", kFwksKey, {128, 128, 56, 56}},
    Case{"onednn-128x128x28x28", kFwksKey, {128, 128, 28, 28}},
    Case{"onednn-128x512x28x28", kFwksKey, {128, 512, 28, 28}},
    Case{"onednn-128x256x28x28", kFwksKey, {128, 256, 28, 28}},
    Case{"onednn-128x256x14x14", kFwksKey, {128, 256, 14, 14}},
    Case{"onednn-128x1024x14x14", kFwksKey, {128, 1024, 14, 14}},
    Case{"onednn-128x512x14x14", kFwksKey, {128, 512, 14, 14}},
    Case{"onednn-128x512x7x7", kFwksKey, {128, 512, 7, 7}},
    Case{"onednn-128x2048x7x7", kFwksKey, {128, 2048, 7, 7}},
    Case{"onednn-24x64x112x112", kFwksKey, {24, 64, 112, 112}},
    Case{"onednn-24x256x56x56", kFwksKey, {24, 256, 56, 56}},
    Case{"onednn-24x512x56x56", kFwksKey, {24, 512, 56, 56}},
    Case{"onednn-24x512x28x28", kFwksKey, {24, 512, 28, 28}},
    Case{"onednn-24x1024x28x28", kFwksKey, {24, 1024, 28, 28}},
    Case{"onednn-24x1024x14x14", kFwksKey, {24, 1024, 14, 14}},
    Case{"onednn-24x2048x14x14", kFwksKey, {24, 2048, 14, 14}},
    Case{"onednn-24x2048x7x7", kFwksKey, {24, 2048, 7, 7}},
    Case{"onednn-16x512", kFwksKey, {16, 512}},
    Case{"onednn-16x256", kFwksKey, {16, 256}},
    Case{"onednn-4x64x64x512", kFwksKey, {4, 64, 64, 512}},
    Case{"onednn-4x128x64x512", kFwksKey, {4, 128, 64, 512}},
    Case{"onednn-4x128x64x128", kFwksKey, {4, 128, 64, 128}},
    Case{"onednn-4x256x64x128", kFwksKey, {4, 256, 64, 128}},
    Case{"onednn-4x256x128x1", kFwksKey, {4, 256, 128, 1}},
    Case{"onednn-4x512x128x1", kFwksKey, {4, 512, 128, 1}},
    Case{"onednn-4x1024x128x1", kFwksKey, {4, 1024, 128, 1}},
    Case{"onednn-4x256x128", kFwksKey, {4, 256, 128}},
    Case{"onednn-4x256x512", kFwksKey, {4, 256, 512}},
    Case{"onednn-4x128x512", kFwksKey, {4, 128, 512}},
    Case{"onednn-4x128x15000", kFwksKey, {4, 128, 15000}},
    Case{"onednn-2x64x64x512", kFwksKey, {2, 64, 64, 512}},
    Case{"onednn-2x128x64x512", kFwksKey, {2, 128, 64, 512}},
    Case{"onednn-2x128x64x128", kFwksKey, {2, 128, 64, 128}},
    Case{"onednn-2x256x64x128", kFwksKey, {2, 256, 64, 128}},
    Case{"onednn-2x256x128x1", kFwksKey, {2, 256, 128, 1}},
    Case{"onednn-2x512x128x1", kFwksKey, {2, 512, 128, 1}},
    Case{"onednn-2x1024x128x1", kFwksKey, {2, 1024, 128, 1}},
    Case{"onednn-2x256x128", kFwksKey, {2, 256, 128}},
    Case{"onednn-2x256x512", kFwksKey, {2, 256, 512}},
    Case{"onednn-2x128x512", kFwksKey, {2, 128, 512}},
    Case{"onednn-2x128x15000", kFwksKey, {2, 128, 15000}},
    Case{"onednn-4x32x384x576", kFwksKey, {4, 32, 384, 576}},
    Case{"onednn-4x64x384x576", kFwksKey, {4, 64, 384, 576}},
    Case{"onednn-4x128x384x576", kFwksKey, {4, 128, 384, 576}},
    Case{"onednn-4x128x192x288", kFwksKey, {4, 128, 192, 288}},
    Case{"onednn-4x256x192x288", kFwksKey, {4, 256, 192, 288}},
    Case{"onednn-4x256x96x144", kFwksKey, {4, 256, 96, 144}},
    Case{"onednn-4x728x96x144", kFwksKey, {4, 728, 96, 144}},
    Case{"onednn-4x728x48x72", kFwksKey, {4, 728, 48, 72}},
    Case{"onednn-4x1024x48x72", kFwksKey, {4, 1024, 48, 72}},
    Case{"onednn-4x1536x48x72", kFwksKey, {4, 1536, 48, 72}},
    Case{"onednn-4x2048x48x72", kFwksKey, {4, 2048, 48, 72}},
    Case{"onednn-4x256x48x72", kFwksKey, {4, 256, 48, 72}},
    Case{"onednn-4x256x1x1", kFwksKey, {4, 256, 1, 1}},
    Case{"onednn-4x48x192x288", kFwksKey, {4, 48, 192, 288}},
    Case{"onednn-4x256x384x576", kFwksKey, {4, 256, 384, 576}},
    Case{"onednn-256x64x112x112", kFwksKey, {256, 64, 112, 112}},
    Case{"onednn-256x64x56x56", kFwksKey, {256, 64, 56, 56}},
    Case{"onednn-256x256x56x56", kFwksKey, {256, 256, 56, 56}},
    Case{"onednn-256x128x56x56", kFwksKey, {256, 128, 56, 56}},
    Case{"onednn-256x128x28x28", kFwksKey, {256, 128, 28, 28}},
    Case{"onednn-256x512x28x28", kFwksKey, {256, 512, 28, 28}},
    Case{"onednn-256x256x28x28", kFwksKey, {256, 256, 28, 28}},
    Case{"onednn-256x256x14x14", kFwksKey, {256, 256, 14, 14}},
    Case{"onednn-256x1024x14x14", kFwksKey, {256, 1024, 14, 14}},
    Case{"onednn-256x512x14x14", kFwksKey, {256, 512, 14, 14}},
    Case{"onednn-256x512x7x7", kFwksKey, {256, 512, 7, 7}},
    Case{"onednn-256x2048x7x7", kFwksKey, {256, 2048, 7, 7}},
    Case{"onednn-4x8x640x1024", kFwksKey, {4, 8, 640, 1024}},
    Case{"onednn-4x16x320x512", kFwksKey, {4, 16, 320, 512}},
    Case{"onednn-4x24x160x256", kFwksKey, {4, 24, 160, 256}},
    Case{"onednn-4x32x80x128", kFwksKey, {4, 32, 80, 128}},
    Case{"onednn-4x40x40x64", kFwksKey, {4, 40, 40, 64}},
    Case{"onednn-4x48x20x32", kFwksKey, {4, 48, 20, 32}},
    Case{"onednn-4x56x10x16", kFwksKey, {4, 56, 10, 16}},
    Case{"onednn-4x256x10x16", kFwksKey, {4, 256, 10, 16}},
    Case{"onednn-4x168x10x16", kFwksKey, {4, 168, 10, 16}},
    Case{"onednn-1x16384x768x1", kFwksKey, {1, 16384, 768, 1}},
    // oneDNN benchdnn, tests/benchdnn/inputs/bnorm/shapes_1d
    Case{"onednn-1x16x1", kShapes1d, {1, 16, 1}},
    Case{"onednn-1x32x30", kShapes1d, {1, 32, 30}},
    Case{"onednn-32x128x10", kShapes1d, {32, 128, 10}},
    Case{"onednn-32x27x7", kShapes1d, {32, 27, 7}},
    Case{"onednn-9x128x1", kShapes1d, {9, 128, 1}},
    // oneDNN benchdnn, tests/benchdnn/inputs/bnorm/shapes_2d
    Case{"onednn-1x1x1x1", kShapes2d, {1, 1, 1, 1}},
    Case{"onednn-1x3x1x1", kShapes2d, {1, 3, 1, 1}},
    Case{"onednn-1x256x28x28", kShapes2d, {1, 256, 28, 28}},
    Case{"onednn-1x257x28x28", kShapes2d, {1, 257, 28, 28}},
    Case{"onednn-1x1024x28x17", kShapes2d, {1, 1024, 28, 17}},
    Case{"onednn-2x128x2x2", kShapes2d, {2, 128, 2, 2}},
    // oneDNN benchdnn, tests/benchdnn/inputs/bnorm/shapes_3d
    Case{"onednn-1x16x40x40x40", kShapes3d, {1, 16, 40, 40, 40}},
    Case{"onednn-32x128x12x10x8", kShapes3d, {32, 128, 12, 10, 8}},
    // oneDNN benchdnn, tests/benchdnn/inputs/bnorm/shapes_ci
    Case{"onednn-2x23", kShapesCi, {2, 23}},
    Case{"onednn-2x32x32", kShapesCi, {2, 32, 32}},
    Case{"onednn-5x33x27", kShapesCi, {5, 33, 27}},
    Case{"onednn-2x256x28x28", kShapesCi, {2, 256, 28, 28}},
    Case{"onednn-4x200x17x16", kShapesCi, {4, 200, 17, 16}},
    Case{"onednn-2x16x12x12x12", kShapesCi, {2, 16, 12, 12, 12}},
    Case{"onednn-1x19x4x6x6", kShapesCi, {1, 19, 4, 6, 6}},
    // oneDNN benchdnn, tests/benchdnn/inputs/bnorm/shapes_densenet_121
    Case{"onednn-1x64x112x112", kDenseNet, {1, 64, 112, 112}},
    Case{"onednn-1x64x57x57", kDenseNet, {1, 64, 57, 57}},
    Case{"onednn-1x128x57x57", kDenseNet, {1, 128, 57, 57}},
    Case{"onednn-1x96x57x57", kDenseNet, {1, 96, 57, 57}},
    Case{"onednn-1x160x57x57", kDenseNet, {1, 160, 57, 57}},
    Case{"onednn-1x192x57x57", kDenseNet, {1, 192, 57, 57}},
    Case{"onednn-1x224x57x57", kDenseNet, {1, 224, 57, 57}},
    Case{"onednn-1x256x57x57", kDenseNet, {1, 256, 57, 57}},
    Case{"onednn-1x128x29x29", kDenseNet, {1, 128, 29, 29}},
    Case{"onednn-1x160x29x29", kDenseNet, {1, 160, 29, 29}},
    Case{"onednn-1x192x29x29", kDenseNet, {1, 192, 29, 29}},
    Case{"onednn-1x224x29x29", kDenseNet, {1, 224, 29, 29}},
    Case{"onednn-1x256x29x29", kDenseNet, {1, 256, 29, 29}},
    Case{"onednn-1x288x29x29", kDenseNet, {1, 288, 29, 29}},
    Case{"onednn-1x320x29x29", kDenseNet, {1, 320, 29, 29}},
    Case{"onednn-1x352x29x29", kDenseNet, {1, 352, 29, 29}},
    Case{"onednn-1x384x29x29", kDenseNet, {1, 384, 29, 29}},
    Case{"onednn-1x416x29x29", kDenseNet, {1, 416, 29, 29}},
    Case{"onednn-1x448x29x29", kDenseNet, {1, 448, 29, 29}},
    Case{"onednn-1x480x29x29", kDenseNet, {1, 480, 29, 29}},
    Case{"onednn-1x512x29x29", kDenseNet, {1, 512, 29, 29}},
    Case{"onednn-1x256x15x15", kDenseNet, {1, 256, 15, 15}},
    Case{"onednn-1x128x15x15", kDenseNet, {1, 128, 15, 15}},
    Case{"onednn-1x288x15x15", kDenseNet, {1, 288, 15, 15}},
    Case{"onednn-1x320x15x15", kDenseNet, {1, 320, 15, 15}},
    Case{"onednn-1x352x15x15", kDenseNet, {1, 352, 15, 15}},
    Case{"onednn-1x384x15x15", kDenseNet, {1, 384, 15, 15}},
    Case{"onednn-1x416x15x15", kDenseNet, {1, 416, 15, 15}},
    Case{"onednn-1x448x15x15", kDenseNet, {1, 448, 15, 15}},
    Case{"onednn-1x480x15x15", kDenseNet, {1, 480, 15, 15}},
    Case{"onednn-1x512x15x15", kDenseNet, {1, 512, 15, 15}},
    Case{"onednn-1x544x15x15", kDenseNet, {1, 544, 15, 15}},
    Case{"onednn-1x576x15x15", kDenseNet, {1, 576, 15, 15}},
    Case{"onednn-1x608x15x15", kDenseNet, {1, 608, 15, 15}},
    Case{"onednn-1x640x15x15", kDenseNet, {1, 640, 15, 15}},
    Case{"onednn-1x672x15x15", kDenseNet, {1, 672, 15, 15}},
    Case{"onednn-1x704x15x15", kDenseNet, {1, 704, 15, 15}},
    Case{"onednn-1x736x15x15", kDenseNet, {1, 736, 15, 15}},
    Case{"onednn-1x768x15x15", kDenseNet, {1, 768, 15, 15}},
    Case{"onednn-1x800x15x15", kDenseNet, {1, 800, 15, 15}},
    Case{"onednn-1x832x15x15", kDenseNet, {1, 832, 15, 15}},
    Case{"onednn-1x864x15x15", kDenseNet, {1, 864, 15, 15}},
    Case{"onednn-1x896x15x15", kDenseNet, {1, 896, 15, 15}},
    Case{"onednn-1x928x15x15", kDenseNet, {1, 928, 15, 15}},
    Case{"onednn-1x960x15x15", kDenseNet, {1, 960, 15, 15}},
    Case{"onednn-1x992x15x15", kDenseNet, {1, 992, 15, 15}},
    Case{"onednn-1x1024x15x15", kDenseNet, {1, 1024, 15, 15}},
    Case{"onednn-1x512x8x8", kDenseNet, {1, 512, 8, 8}},
    Case{"onednn-1x128x8x8", kDenseNet, {1, 128, 8, 8}},
    Case{"onednn-1x544x8x8", kDenseNet, {1, 544, 8, 8}},
    Case{"onednn-1x576x8x8", kDenseNet, {1, 576, 8, 8}},
    Case{"onednn-1x608x8x8", kDenseNet, {1, 608, 8, 8}},
    Case{"onednn-1x640x8x8", kDenseNet, {1, 640, 8, 8}},
    Case{"onednn-1x672x8x8", kDenseNet, {1, 672, 8, 8}},
    Case{"onednn-1x704x8x8", kDenseNet, {1, 704, 8, 8}},
    Case{"onednn-1x736x8x8", kDenseNet, {1, 736, 8, 8}},
    Case{"onednn-1x768x8x8", kDenseNet, {1, 768, 8, 8}},
    Case{"onednn-1x800x8x8", kDenseNet, {1, 800, 8, 8}},
    Case{"onednn-1x832x8x8", kDenseNet, {1, 832, 8, 8}},
    Case{"onednn-1x864x8x8", kDenseNet, {1, 864, 8, 8}},
    Case{"onednn-1x896x8x8", kDenseNet, {1, 896, 8, 8}},
    Case{"onednn-1x928x8x8", kDenseNet, {1, 928, 8, 8}},
    Case{"onednn-1x960x8x8", kDenseNet, {1, 960, 8, 8}},
    Case{"onednn-1x992x8x8", kDenseNet, {1, 992, 8, 8}},
    Case{"onednn-1x1024x8x8", kDenseNet, {1, 1024, 8, 8}},
    // oneDNN benchdnn, tests/benchdnn/inputs/bnorm/shapes_googlenet_v2
    Case{"onednn-96x64x112x112", kGoogLeNetV2, {96, 64, 112, 112}},
    Case{"onednn-96x64x56x56", kGoogLeNetV2, {96, 64, 56, 56}},
    Case{"onednn-96x192x56x56", kGoogLeNetV2, {96, 192, 56, 56}},
    Case{"onednn-96x64x28x28", kGoogLeNetV2, {96, 64, 28, 28}},
    Case{"onednn-96x96x28x28", kGoogLeNetV2, {96, 96, 28, 28}},
    Case{"onednn-96x32x28x28", kGoogLeNetV2, {96, 32, 28, 28}},
    Case{"onednn-96x128x28x28", kGoogLeNetV2, {96, 128, 28, 28}},
    Case{"onednn-96x160x14x14", kGoogLeNetV2, {96, 160, 14, 14}},
    Case{"onednn-96x96x14x14", kGoogLeNetV2, {96, 96, 14, 14}},
    Case{"onednn-96x128x4x4", kGoogLeNetV2, {96, 128, 4, 4}},
    Case{"onednn-96x224x14x14", kGoogLeNetV2, {96, 224, 14, 14}},
    Case{"onednn-96x64x14x14", kGoogLeNetV2, {96, 64, 14, 14}},
    Case{"onednn-96x128x14x14", kGoogLeNetV2, {96, 128, 14, 14}},
    Case{"onednn-96x192x14x14", kGoogLeNetV2, {96, 192, 14, 14}},
    Case{"onednn-96x192x7x7", kGoogLeNetV2, {96, 192, 7, 7}},
    Case{"onednn-96x256x14x14", kGoogLeNetV2, {96, 256, 14, 14}},
    Case{"onednn-96x256x7x7", kGoogLeNetV2, {96, 256, 7, 7}},
    Case{"onednn-96x128x2x2", kGoogLeNetV2, {96, 128, 2, 2}},
    Case{"onednn-96x352x7x7", kGoogLeNetV2, {96, 352, 7, 7}},
    Case{"onednn-96x320x7x7", kGoogLeNetV2, {96, 320, 7, 7}},
    Case{"onednn-96x160x7x7", kGoogLeNetV2, {96, 160, 7, 7}},
    Case{"onednn-96x224x7x7", kGoogLeNetV2, {96, 224, 7, 7}},
    Case{"onednn-96x128x7x7", kGoogLeNetV2, {96, 128, 7, 7}},
    // oneDNN benchdnn, tests/benchdnn/inputs/bnorm/shapes_googlenet_v3
    Case{"onednn-96x32x149x149", kGoogLeNetV3, {96, 32, 149, 149}},
    Case{"onednn-96x32x147x147", kGoogLeNetV3, {96, 32, 147, 147}},
    Case{"onednn-96x64x147x147", kGoogLeNetV3, {96, 64, 147, 147}},
    Case{"onednn-96x80x73x73", kGoogLeNetV3, {96, 80, 73, 73}},
    Case{"onednn-96x192x71x71", kGoogLeNetV3, {96, 192, 71, 71}},
    Case{"onednn-96x64x35x35", kGoogLeNetV3, {96, 64, 35, 35}},
    Case{"onednn-96x48x35x35", kGoogLeNetV3, {96, 48, 35, 35}},
    Case{"onednn-96x96x35x35", kGoogLeNetV3, {96, 96, 35, 35}},
    Case{"onednn-96x32x35x35", kGoogLeNetV3, {96, 32, 35, 35}},
    Case{"onednn-96x384x17x17", kGoogLeNetV3, {96, 384, 17, 17}},
    Case{"onednn-96x96x17x17", kGoogLeNetV3, {96, 96, 17, 17}},
    Case{"onednn-96x192x17x17", kGoogLeNetV3, {96, 192, 17, 17}},
    Case{"onednn-96x128x17x17", kGoogLeNetV3, {96, 128, 17, 17}},
    Case{"onednn-96x160x17x17", kGoogLeNetV3, {96, 160, 17, 17}},
    Case{"onednn-96x320x8x8", kGoogLeNetV3, {96, 320, 8, 8}},
    Case{"onednn-96x192x8x8", kGoogLeNetV3, {96, 192, 8, 8}},
    Case{"onednn-96x384x8x8", kGoogLeNetV3, {96, 384, 8, 8}},
    Case{"onednn-96x448x8x8", kGoogLeNetV3, {96, 448, 8, 8}},
    // oneDNN benchdnn, tests/benchdnn/inputs/bnorm/shapes_large
    Case{"onednn-3072x64x112x112", kLarge, {3072, 64, 112, 112}},
    // oneDNN benchdnn, tests/benchdnn/inputs/bnorm/shapes_regressions
    Case{"onednn-2x251x28x28", kRegressions, {2, 251, 28, 28}},
    Case{"onednn-2x64x224x224", kRegressions, {2, 64, 224, 224}},
    Case{"onednn-2x64x56x56", kRegressions, {2, 64, 56, 56}},
    Case{"onednn-8x322x16x16", kRegressions, {8, 322, 16, 16}},
    Case{"onednn-88x600x16x16", kRegressions, {88, 600, 16, 16}},
    Case{"onednn-88x980x16x16", kRegressions, {88, 980, 16, 16}},
    Case{"onednn-88x800x16x16", kRegressions, {88, 800, 16, 16}},
    Case{"onednn-88x900x16x16", kRegressions, {88, 900, 16, 16}},
    Case{"onednn-12x4x8x8", kRegressions, {12, 4, 8, 8}},
    Case{"onednn-1x24x14x14", kRegressions, {1, 24, 14, 14}},
    // oneDNN benchdnn, tests/benchdnn/inputs/bnorm/shapes_resnet_50
    Case{"onednn-50x64x112x112", kResNet, {50, 64, 112, 112}},
    Case{"onednn-50x256x56x56", kResNet, {50, 256, 56, 56}},
    Case{"onednn-50x64x56x56", kResNet, {50, 64, 56, 56}},
    Case{"onednn-50x512x28x28", kResNet, {50, 512, 28, 28}},
    Case{"onednn-50x128x28x28", kResNet, {50, 128, 28, 28}},
    Case{"onednn-50x1024x14x14", kResNet, {50, 1024, 14, 14}},
    Case{"onednn-50x256x14x14", kResNet, {50, 256, 14, 14}},
    Case{"onednn-50x2048x7x7", kResNet, {50, 2048, 7, 7}},
    Case{"onednn-50x512x7x7", kResNet, {50, 512, 7, 7}},
    // oneDNN benchdnn, tests/benchdnn/inputs/bnorm/test_bnorm_gpu
    Case{"onednn-2x96x35x35", kTestGpu, {2, 96, 35, 35}},
};
// clang-format on

}  // namespace bench
