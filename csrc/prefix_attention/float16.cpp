#include "kernels.h"

namespace fastprefix {
FASTPREFIX_DEFINE_KERNELS(at::Half, Plain<float>)
}
