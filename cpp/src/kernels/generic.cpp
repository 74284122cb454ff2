// The kernels for any machine.
#include "kernels/vec/generic.hpp"

#include "kernels/table-inl.hpp"

namespace batchnorm::kernels {

const KernelTable generic_table = make_table();

}  // namespace batchnorm::kernels
