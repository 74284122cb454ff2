// The kernels for x86-64-v2 (SSE4.2).
#include "kernels/vec/x86_64_v2.hpp"

#include "kernels/table-inl.hpp"

namespace batchnorm::kernels {

const KernelTable x86_64_v2_table = make_table();

}  // namespace batchnorm::kernels
