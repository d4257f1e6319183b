#include "kernels.h"

namespace fastprefix {
FASTPREFIX_DEFINE_KERNELS(double, Plain<double>)
}
