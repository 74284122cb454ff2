# Plants mistakes in the kernels for GPUs, one at a time, and fails unless each is found: by schedules that give other
# bits, by the machine that runs them, or by a sanitizer; and unless the kernels as they are pass all of that.
#     cmake -D COMPILER=g++ -D SOURCE=REPOSITORY -D BUILD=FOLDER -D LIBRARY=FILE -D INCLUDES=FOLDERS \
#           -D FLAGS=OPTIONS -P cuda_mistakes.cmake
cmake_minimum_required(VERSION 3.24...4.3)

file(READ ${SOURCE}/cpp/src/cuda/planar.cuh kernels)

# Builds the program with `text` as its kernels and runs it.
function(build_and_run name text flags result output)
  set(folder ${BUILD}/${name})
  file(WRITE ${folder}/cuda/planar.cuh "${text}")
  execute_process(COMMAND ${COMPILER} -std=c++20 ${FLAGS} -O1 -g1 ${flags} -I${folder} -I${SOURCE}/cpp/src
      -I${SOURCE}/tests/cpp ${INCLUDES} ${SOURCE}/tests/cpp/cuda_schedules.cpp ${LIBRARY} -fopenmp -pthread
      -o ${folder}/cuda_schedules
    RESULT_VARIABLE code ERROR_VARIABLE errors)
  if(NOT code EQUAL 0)
    message(FATAL_ERROR "${name} must compile, got: ${errors}")
  endif()
  # Under a sanitizer the mistake is found in whatever order threads run.
  set(schedules "")
  if(flags)
    set(schedules 1)
  endif()
  execute_process(COMMAND ${folder}/cuda_schedules ${schedules} RESULT_VARIABLE code OUTPUT_VARIABLE text
    ERROR_VARIABLE errors TIMEOUT 300)
  set(${result} "${code}" PARENT_SCOPE)
  set(${output} "${text}${errors}" PARENT_SCOPE)
endfunction()

function(expect_found name flags pattern from to)
  string(REPLACE "${from}" "" without "${kernels}")
  string(LENGTH "${kernels}" length)
  string(LENGTH "${without}" length_without)
  string(LENGTH "${from}" length_of_from)
  math(EXPR times "(${length} - ${length_without}) / ${length_of_from}")
  if(times LESS 1)
    message(FATAL_ERROR "planar.cuh must have: ${from}")
  endif()
  string(REPLACE "${from}" "${to}" text "${kernels}")
  build_and_run(${name} "${text}" "${flags}" code output)
  if(code EQUAL 0 OR NOT output MATCHES "${pattern}")
    message(FATAL_ERROR "${name} must be found by ${pattern}, got ${code}: ${output}")
  endif()
  message("found ${name}")
endfunction()

foreach(flags "" "-fsanitize=thread" "-fsanitize=address")
  build_and_run(none${flags} "${kernels}" "${flags}" code output)
  if(NOT code EQUAL 0)
    message(FATAL_ERROR "the kernels must pass with ${flags}, got ${code}: ${output}")
  endif()
endforeach()

set(differ "[1-9][0-9]* of 60 schedules differ")
expect_found(no_barrier_before_the_slab_is_loaded_again "" "${differ}"
  "__syncthreads();  // the slab, and what was told, are free" "")
expect_found(no_meeting_between_sums_and_their_sum "" "${differ}|nobody can run"
  "mine.meet(span);  // all sums are there" "")
expect_found(no_meeting_through_memory "" "${differ}"
  "device::meet(span.count + index, span.blocks, rounds_++);" "__syncthreads();")
expect_found(no_barrier_after_plain_loads "" "${differ}"
  "if (!device::kHasClusters || !span.whole_vectors) __syncthreads();" "")
expect_found(sums_that_are_not_double_buffered "-fsanitize=thread" "data race" "summed++ % 2"
  "summed++ * 0")
expect_found(no_barrier_between_coefficients_and_their_use "-fsanitize=thread" "data race|nobody can run"
  "__syncthreads();  // all know what is next" "")
expect_found(a_barrier_in_a_branch "" "nobody can run" "__syncthreads();  // the slab, and what was told, are free"
  "if (threadIdx.x == 0) __syncthreads();")
expect_found(copies_that_are_not_awaited "" "${differ}|ended before its copies|nobody can run"
  "if (awaited >= 0) device::wait" "if (awaited >= 1000000) device::wait")
expect_found(a_copy_beyond_the_shared_memory "-fsanitize=address" "heap-buffer-overflow"
  "(input * span.chunks_a_block + q) * span.stride" "(input * span.chunks_a_block + q + 1) * span.stride")
