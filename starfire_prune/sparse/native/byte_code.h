// All code for operations on quantized values of one instruction set.

#include "vectors.h"
#include "activations.h"
#include "math_bytes.h"
#include "rows.h"
#include "byte_kernels.h"
#include "spatial.h"
#include "spatial_items.h"
#include "taps.h"
#include "byte_operations.h"
