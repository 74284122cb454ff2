// The kernels for aarch64 NEON.
#include "kernels/vec/neon.hpp"

#include "kernels/table-inl.hpp"

namespace batchnorm::kernels {

const KernelTable neon_table = make_table();

}  // namespace batchnorm::kernels
