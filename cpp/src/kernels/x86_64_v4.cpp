// The kernels for x86-64-v4 (AVX-512).
#include "kernels/vec/x86_64_v4.hpp"

#include "kernels/table-inl.hpp"

namespace batchnorm::kernels {

const KernelTable x86_64_v4_table = make_table();

}  // namespace batchnorm::kernels
