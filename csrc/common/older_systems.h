// Compiles the compiler's string streams into this library. Otherwise they would come from the system's libstdc++,
// which may be too old (see older_systems.cpp). setup.py includes this file before all other headers.
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
