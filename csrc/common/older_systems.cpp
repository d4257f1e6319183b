// What newer compilers ask of the system's libraries, and older ones do not have: it is in this library itself, so that
// it loads wherever PyTorch does (glibc 2.28), whichever GCC compiled it.
#include <new>

#if defined(__GLIBC__)

// glibc 2.32: whether a program has a single thread, and reference counts need no atomic operations. Say no.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

// libstdc++ of GCC 11.
namespace std {
void __throw_bad_array_new_length() {
  throw bad_array_new_length();
}
}  // namespace std
#endif
