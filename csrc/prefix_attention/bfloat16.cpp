#include "kernels.h"

namespace fastprefix {
#if defined(__AMX_BF16__)
FASTPREFIX_DEFINE_KERNELS(BFloat16, Bfloat16Tiles)
#elif defined(FASTPREFIX_BFLOAT16_PAIRS)
FASTPREFIX_DEFINE_KERNELS(BFloat16, Bfloat16Pairs)
#else
FASTPREFIX_DEFINE_KERNELS(BFloat16, Plain<float>)
#endif
}
