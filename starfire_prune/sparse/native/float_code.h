// All code for operations on floats of one instruction set.

#include "vectors.h"
#include "activations.h"
#include "math_floats.h"
#include "pointwise.h"
#include "spatial.h"
#include "rows.h"
#include "spatial_items.h"
#include "linear.h"
#include "images.h"
#include "operations.h"
