// The same kernel with dot products of bytes: a feature beside an instruction set, see CMakeLists.txt.
#include "kernel.h"
