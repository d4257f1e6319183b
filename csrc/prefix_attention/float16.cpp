#include "kernels.h"

namespace fastprefix {
FASTPREFIX_DEFINE_KERNELS(Float16, Plain<float>)
}
