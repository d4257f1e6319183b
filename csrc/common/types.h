// PyTorch's 16-bit floating-point types.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace fastprefix {

using BFloat16 = torch::headeronly::BFloat16;
using Float16 = torch::headeronly::Half;

}  // namespace fastprefix
