// Definitions of symbols that newer compilers expect in the system's libraries and that older systems lack. With them
// in this library, it loads wherever PyTorch does (glibc 2.28), with any version of GCC as its compiler.
#include <new>

#if defined(__GLIBC__)

// Since glibc 2.32. A nonzero value means that the program has one thread, so reference counts need no atomic
// operations. 0 is always correct.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

// Since the libstdc++ of GCC 11.
namespace std {
void __throw_bad_array_new_length() {
  throw bad_array_new_length();
}
}  // namespace std
#endif
