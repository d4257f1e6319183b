#include "kernels.h"

namespace fastprefix {
FASTPREFIX_DEFINE_KERNELS(float, Plain<float>)
}
