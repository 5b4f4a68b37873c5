// The library as one object, which test programs and examples link.
#define DIFFUSION_IMPLEMENTATION
#include "diffusion.h"
