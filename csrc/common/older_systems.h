// String streams, as newer compilers have them, are compiled into this library instead of taken from a newer libstdc++,
// so that it loads wherever PyTorch does (see older_systems.cpp). setup.py includes this before all other headers.
#pragma once

#include <istream>
#include <locale>
#include <ostream>
#include <string>

#if defined(__GLIBCXX__)
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 0
#include <sstream>
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 1
#endif
