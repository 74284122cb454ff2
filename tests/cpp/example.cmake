# Installs a build into an empty prefix; configures, builds and runs example/ against it.
#     cmake -D BUILD=DIR -D CONFIG=NAME -D WORK=DIR -D GENERATOR=NAME -D COMPILER=FILE [-D FLAGS=...]
#           [-D TOOLCHAIN=FILE] [-D EMULATOR=COMMAND] -P example.cmake
cmake_minimum_required(VERSION 3.24...4.3)

function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE code OUTPUT_VARIABLE text ERROR_VARIABLE text)
  if(NOT code EQUAL 0)
    list(JOIN ARGN " " command)
    message(FATAL_ERROR "must end with 0, got ${code}: ${command}\n${text}")
  endif()
endfunction()

file(REMOVE_RECURSE ${WORK})
run(${CMAKE_COMMAND} --install ${BUILD} --config ${CONFIG} --prefix ${WORK}/prefix)
set(arguments -D CMAKE_BUILD_TYPE=${CONFIG} -D CMAKE_PREFIX_PATH=${WORK}/prefix "-DCMAKE_CXX_FLAGS=${FLAGS}")
if(TOOLCHAIN)
  list(APPEND arguments -D CMAKE_TOOLCHAIN_FILE=${TOOLCHAIN})
else()
  list(APPEND arguments -D CMAKE_CXX_COMPILER=${COMPILER})
endif()
run(${CMAKE_COMMAND} -S ${CMAKE_CURRENT_LIST_DIR}/example -B ${WORK}/build -G ${GENERATOR} ${arguments})
run(${CMAKE_COMMAND} --build ${WORK}/build --config ${CONFIG})
find_program(example NAMES example PATHS ${WORK}/build ${WORK}/build/${CONFIG} NO_DEFAULT_PATH
             NO_CMAKE_FIND_ROOT_PATH REQUIRED)
run(${EMULATOR} ${example})
