// The kernels for x86-64-v3 (AVX2, FMA).
#include "kernels/vec/x86_64_v3.hpp"

#include "kernels/table-inl.hpp"

namespace batchnorm::kernels {

const KernelTable x86_64_v3_table = make_table();

}  // namespace batchnorm::kernels
