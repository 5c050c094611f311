/* Runs a program on a batch of images of one value, and prints the outputs.

   Build it with the header and the library of the installed package:

     cc run_program.c -o run_program \
         -I"$(python -c 'from starfire_prune import runtime; print(runtime.HEADER.parent)')" \
         "$(python -c 'from starfire_prune import runtime; print(runtime.library_path())')"
     ./run_program model.program 1 0.5
*/

#include <stdio.h>
#include <stdlib.h>

#include "starfire.h"

#define MAX_TENSORS 64

/* Floats of an input or output for each image. */
static size_t floats_of(const starfire_program *program, starfire_side side, int index) {
  int64_t sizes[STARFIRE_MAX_DIMS];
  int dims = starfire_shape(program, side, index, sizes);
  size_t floats = 1;
  for (int i = 0; i < dims; ++i) floats *= (size_t)sizes[i];
  return floats;
}

int main(int count, char **arguments) {
  if (count != 4) {
    fprintf(stderr, "usage: run_program FILE BATCH VALUE\n");
    return 2;
  }
  starfire_program *program = starfire_load_file(arguments[1]);
  if (!program) {
    fprintf(stderr, "%s: %s\n", arguments[1], starfire_error());
    return 1;
  }
  long batch = strtol(arguments[2], NULL, 10);
  float value = strtof(arguments[3], NULL);
  if (batch < 1) {
    fprintf(stderr, "BATCH must be at least 1\n");
    return 1;
  }
  float *inputs[MAX_TENSORS], *outputs[MAX_TENSORS];
  for (int i = 0; i < starfire_count(program, STARFIRE_INPUT); ++i) {
    size_t floats = (size_t)batch * floats_of(program, STARFIRE_INPUT, i);
    inputs[i] = malloc(floats * sizeof(float));
    for (size_t j = 0; j < floats; ++j) inputs[i][j] = value;
  }
  for (int i = 0; i < starfire_count(program, STARFIRE_OUTPUT); ++i)
    outputs[i] = malloc((size_t)batch * floats_of(program, STARFIRE_OUTPUT, i) * sizeof(float));
  if (starfire_run(program, batch, (const float *const *)inputs, outputs)) {
    fprintf(stderr, "%s\n", starfire_error());
    return 1;
  }
  for (int i = 0; i < starfire_count(program, STARFIRE_OUTPUT); ++i) {
    size_t floats = (size_t)batch * floats_of(program, STARFIRE_OUTPUT, i);
    const char *name = starfire_name(program, STARFIRE_OUTPUT, i);
    for (size_t j = 0; j < floats; ++j) printf("%s[%zu] = %.9g\n", name, j, outputs[i][j]);
    free(outputs[i]);
  }
  for (int i = 0; i < starfire_count(program, STARFIRE_INPUT); ++i) free(inputs[i]);
  starfire_free(program);
  return 0;
}
