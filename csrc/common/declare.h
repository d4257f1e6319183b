// What a list of arguments can be expanded to. A list is a macro of X(type, name) with separators between them, so that
// structs, enums and parameter lists that name every argument are all made of one list.
#pragma once

#define FASTPREFIX_NOTHING()
#define FASTPREFIX_COMMA() ,

#define FASTPREFIX_FIELD(type, name) type name;
#define FASTPREFIX_FLAG(type, name) bool name = false;
#define FASTPREFIX_RESULT(type, name) Tensor name;
#define FASTPREFIX_NAME(type, name) name
#define FASTPREFIX_PARAMETER(type, name) type name
